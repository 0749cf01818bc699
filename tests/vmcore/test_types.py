# SPDX-License-Identifier: GPL-2.0-only
"""Types and symbols out of the dump alone, against those of the vmlinux with debug information."""

import dataclasses
import json
import pickle
import random
import subprocess
import sys

import drgn
import pytest
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms
from drgn.helpers.linux.mm import task_rss
from drgn.helpers.linux.pid import find_task

from kvirt.btf import Btf
from kvirt.checks.process import ProcessChecker
from kvirt.checks.task import check_task
from kvirt.errors import KvirtError
from kvirt.finders import read_kallsyms, use_btf, use_module_btf, used_btf
from kvirt.kallsyms import Kallsyms
from kvirt.layout import StructLayout, layout_of, read_layout
from kvirt.scheme import Scheme
from kvirt.target import _learn, open_target
from kvirt.tasks import find_process
from tests.vmcore.conftest import TREE, kvirt


def without_vmlinux(dump, *arguments):
    return kvirt("-c", dump.core, "--types", "btf", *arguments)


@pytest.mark.parametrize("command", ["vmas", "check-pid", "check-all"])
def test_the_same_document_without_vmlinux(dump, command):
    pids = () if command == "check-all" else (dump.pid,)
    alone = without_vmlinux(dump, command, *pids, "--format", "json")
    with_it = dump.kvirt(command, *pids, "--format", "json")
    assert (alone.returncode, with_it.returncode) == (0, 0), alone.stderr
    assert '"types": "btf"' in alone.stdout
    assert alone.stdout.replace('"types": "btf"', '"types": "dwarf"') == with_it.stdout
    assert alone.stderr == with_it.stderr


def test_damage_is_found_without_vmlinux(dump):
    done = without_vmlinux(dump, "lab", "damage", "FOLIO-INDEX", dump.pid, "--format", "json")
    assert done.returncode == 1, done.stderr
    assert [f["id"] for f in json.loads(done.stdout)["findings"] if f["severity"] == "error"] == [
        "FOLIO-INDEX"
    ]


def test_what_is_at_hand_is_taken_and_told(dump):
    done = kvirt("-c", dump.core, "check-pid", dump.pid, "--no-vmas")
    assert done.returncode == 0, done.stderr
    assert "types from BTF" in done.stdout
    assert "types from DWARF" in dump.kvirt("check-pid", dump.pid, "--no-vmas").stdout


def test_two_sources_of_types_are_one_too_many(dump):
    done = kvirt("-c", dump.core, "-s", dump.vmlinux, "--types", "btf", "vmas", 1)
    assert done.returncode == 2
    assert "leave out --symbols" in done.stderr


def plain(value):
    """Layouts of structures compared by what is in them."""
    if isinstance(value, StructLayout):
        return value.type_name, value.size, value.members
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def test_the_layout_is_the_same(dump):
    alone = read_layout(open_target(core=dump.core, types="btf").prog)
    assert plain(alone) == plain(layout_of(dump.opened().prog))


def test_another_process_learns_the_same(dump):
    together, apart = drgn.Program(), drgn.Program()
    for prog in (together, apart):
        prog.set_core_dump(dump.core)
    btf, symbols, layout = pickle.loads(pickle.dumps(_learn(together)))
    use_btf(apart, btf, symbols)
    assert plain(layout) == plain(layout_of(together)) == plain(layout_of(apart))
    (_, asked), (_, told) = used_btf(together), used_btf(apart)
    # Each name that was asked for there, with what was found of it.
    assert {**told, **asked} == told
    assert "special_mapping_name" in told
    assert plain(find_process(together, dump.pid)) == plain(find_process(apart, dump.pid))


def bare(dump):
    """The dump, with symbols and without types; and its BTF as it is in it."""
    prog = drgn.Program()
    prog.set_core_dump(dump.core)
    symbols = read_kallsyms(prog)
    prog.register_symbol_finder("symbols", symbols, enable_index=0)
    start, stop = prog.symbol("__start_BTF").address, prog.symbol("__stop_BTF").address
    return prog, prog.read(start, stop - start)


def test_helpers_of_drgn_see_the_same(dump):
    alone, by_dwarf = open_target(core=dump.core, types="btf").prog, dump.opened().prog
    cpus = list(for_each_online_cpu(by_dwarf))
    assert len(cpus) > 1
    assert list(for_each_online_cpu(alone)) == cpus
    for name in (
        "page_offset_base",
        "max_pfn",
        "mem_section",
        "total_swap_pages",
        "nr_swapfiles",
        "_totalram_pages",
    ):
        one, other = alone[name], by_dwarf[name]
        assert (one.address_, one.type_.type_name()) == (other.address_, other.type_.type_name())
    one, other = (task_rss(find_task(prog, dump.pid)) for prog in (alone, by_dwarf))
    assert one == other


def test_symbols_are_those_that_drgn_reads(dump):
    prog = drgn.Program()
    prog.set_core_dump(dump.core)
    table = Kallsyms(prog)
    prog.register_symbol_finder("drgn's", load_vmlinux_kallsyms(prog), enable_index=0)
    by_name = {}
    for symbol in prog.symbols():
        by_name.setdefault(symbol.name, []).append((symbol.address, symbol.size))
    assert len(by_name) > 50_000
    for name in random.Random(7).sample(sorted(by_name), 2000):
        assert sorted(s.address for s in table.find(name)) == sorted(at for at, _ in by_name[name])
    for name in ("swap_info", "init_mm", "copy_vma"):
        assert [(s.address, s.size) for s in table.find(name)] == by_name[name]
    assert list(table.find("copy_vm")) == []


def test_what_is_not_there_is_said(core73_dump):
    for hidden, words in (
        ("__vm_anon_pgoff_lo", "unknown way"),
        ("PG_head", "no page flag PG_head"),
        ("mr64", "mr64.pivot"),
    ):
        prog, btf = bare(core73_dump)
        name = b"\0" + hidden.encode() + b"\0"
        assert btf.count(name) == 1
        use_btf(prog, Btf(btf.replace(name, b"\0" + b"x" * len(hidden) + b"\0")))
        with pytest.raises(KvirtError, match=words):
            layout_of(prog)


# A kernel without KASLR begins here (arch/x86/include/asm/page_64_types.h, __START_KERNEL).
LINKED_AT = 0xFFFFFFFF81000000


def test_symbols_are_where_the_kernel_was_moved_to(dump):
    # By any multiple of 2 MiB up to a GiB; seldom by none.
    prog, _ = bare(dump)
    told = prog["VMCOREINFO"].string_().decode()
    moved = int(told.partition("\nKERNELOFFSET=")[2].partition("\n")[0], 16)
    assert prog.symbol("_stext").address == LINKED_AT + moved
    assert b"nokaslr" not in dump.opened().prog["saved_command_line"].string_().split()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # Both generations of names at once.
        ([(b"\0__vm_anon_pgoff_hi\0", b"\0__vm_virt_pgoff_hi\0")], "more than one kind"),
        # None that is known, where copy_vma() has a parameter for it.
        (
            [
                (b"\0__vm_anon_pgoff_lo\0", b"\0__vm_some_pgoff_lo\0"),
                (b"\0__vm_anon_pgoff_hi\0", b"\0__vm_some_pgoff_hi\0"),
            ],
            "disagree",
        ),
    ],
)
def test_unknown_futures_are_refused(core73_dump, changes, words):
    prog, btf = bare(core73_dump)
    for old, new in changes:
        assert btf.count(old) == 1
        btf = btf.replace(old, new)
    use_btf(prog, Btf(btf))
    with pytest.raises(KvirtError, match=words):
        layout_of(prog)


def test_the_names_before_the_merge(core73_dump):
    prog, btf = bare(core73_dump)
    for name in (b"\0__vm_anon_pgoff_lo\0", b"\0__vm_anon_pgoff_hi\0", b"\0anon_pgoff\0"):
        assert btf.count(name) == 1
        btf = btf.replace(name, name.replace(b"anon", b"virt"))
    use_btf(prog, Btf(btf))
    layout = layout_of(prog)
    assert layout.scheme is Scheme.VIRT_PGOFF
    merged = core73_dump.opened().prog
    for pid in core73_dump.processes().values():
        one, other = (
            check_task(ProcessChecker(p, layout_of(p), moves=False), find_process(p, pid))
            for p in (prog, merged)
        )
        assert [(r.vma.vm_start, r.vma.anon_pgoff, r.kind, r.name) for r in one.vmas] == [
            (r.vma.vm_start, r.vma.anon_pgoff, r.kind, r.name) for r in other.vmas
        ]
        assert (one.pages, one.findings) == (other.pages, other.findings)
        assert one.pages.verified


def test_a_plain_drgn_script_can_use_it(dump, tmp_path):
    script = tmp_path / "tasks.py"
    script.write_text(
        f"import drgn, sys; sys.path.insert(0, {str(TREE)!r})\n"
        "from drgn.helpers.linux.pid import find_task\n"
        "from drgn.helpers.linux.mm import for_each_vma\n"
        "from kvirt.finders import use_btf\n"
        f"prog = drgn.Program(); prog.set_core_dump({str(dump.core)!r})\n"
        "use_btf(prog)\n"
        f"task = find_task(prog, {dump.pid})\n"
        "print(task.comm.string_().decode(), sum(1 for _ in for_each_vma(task.mm)), prog['init_task'].pid)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    listed = json.loads(dump.kvirt("vmas", dump.pid, "--format", "json").stdout)
    assert done.stdout.split() == [listed["comm"], str(len(listed["vmas"])), "(pid_t)0"]


def test_types_of_a_module(dump):
    prog, _ = bare(dump)
    use_btf(prog)
    with pytest.raises(LookupError):
        prog.type("struct fw_cfg_sysfs_entry")
    # The lab's guests load it, for VMCOREINFO.
    use_module_btf(prog, "qemu_fw_cfg")
    entry = prog.type("struct fw_cfg_sysfs_entry")
    assert [m.name for m in entry.members] == ["kobj", "size", "select", "name", "list"]
    with pytest.raises(KvirtError, match="No module nonsense"):
        use_module_btf(prog, "nonsense")
