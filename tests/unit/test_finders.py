# SPDX-License-Identifier: GPL-2.0-only
"""Types made of BTF as drgn prints them. Real kernels are compared with their DWARF in tests/vmcore."""

import subprocess
import sys

import drgn
import pytest

from kvirt.btf import Btf, Kind
from kvirt.errors import KvirtError
from kvirt.finders import _ByName, _register, read_kallsyms, use_btf, used_btf
from kvirt.proc_kallsyms import ProcKallsyms

from .btf_assembler import Assembler
from .test_btf import everything

MEMORY = bytes(range(64))
ADDRESS = 0xFFFF888000001000


def program(btf: Btf, symbols: dict[str, int] | None = None) -> drgn.Program:
    prog = drgn.Program(drgn.host_platform)
    prog.add_memory_segment(ADDRESS, len(MEMORY), lambda at, count, offset, physical: MEMORY[offset:][:count])
    index = drgn.SymbolIndex(
        drgn.Symbol(name, at, 8, drgn.SymbolBinding.GLOBAL, drgn.SymbolKind.OBJECT)
        for name, at in (symbols or {}).items()
    )
    prog.register_symbol_finder("made up", index, enable_index=0)
    _register(prog, "btf", btf, 0)
    return prog


@pytest.fixture
def prog() -> drgn.Program:
    return program(Btf(everything().finish()), {"put": ADDRESS, "jiffies": ADDRESS + 8})


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("pages_t", "typedef unsigned long pages_t"),
        (
            "struct vma",
            "struct vma {\n\tconst char *mm;\n\tunion {\n\t\tstruct {\n\t\t\tpages_t start;\n"
            "\t\t\tpages_t end;\n\t\t};\n\t\tunsigned long rcu;\n\t};\n\tstruct node shared;\n"
            "\tchar comm[16];\n}",
        ),
        ("struct bits", "struct bits {\n\tint low : 3;\n\tint high : 5;\n\tint whole;\n}"),
        ("double", "double"),
        ("unsigned long", "unsigned long"),
    ],
)
def test_types_are_spelled_as_their_source(prog, name, spelling):
    assert str(prog.type(name)) == spelling


@pytest.mark.parametrize("name", ["struct unseen", "union unseen_union"])
def test_what_is_only_declared_is_not_found(prog, name):
    with pytest.raises(LookupError):
        prog.type(name)


def test_members_lie_where_btf_says(prog):
    vma = drgn.Object(prog, "struct vma", address=ADDRESS)
    assert vma.end.value_() == int.from_bytes(MEMORY[16:24], "little")
    assert drgn.offsetof(prog.type("struct vma"), "shared.last") == 40
    bits = drgn.Object(prog, "struct bits", address=ADDRESS + 5)
    # 0x08070605: the lowest three bits are 5, which is -3 in three signed bits.
    assert (bits.low.value_(), bits.high.value_()) == (-3, 0)


def test_enumerators_are_constants_of_their_type(prog):
    assert prog["BLUE"].value_() == 7
    assert prog["BLUE"].type_ is not None and prog["BLUE"].type_.type_name() == "enum colour"
    assert prog.constant("DEEP").value_() == -1 << 35
    assert prog.constant("WIDE_MAX").value_() == (1 << 64) - 1
    assert prog["ALL"].value_() == 0xFFFFFFFF
    with pytest.raises(LookupError):
        prog.constant("GREEN")


def test_functions_and_variables_are_where_their_symbols_are(prog):
    put = prog.function("put")
    assert put.address_ == ADDRESS
    assert [(p.name, p.type.type_name()) for p in put.type_.parameters] == [
        ("to", "const char * restrict"),
        ("count", "pages_t"),
    ]
    assert prog["jiffies"].value_() == int.from_bytes(MEMORY[8:16], "little")
    # It has a prototype and no address: the compiler has inlined it.
    with pytest.raises(LookupError):
        prog.function("print")
    with pytest.raises(LookupError):
        prog.variable("put")


def test_variadic_functions_stay_variadic():
    prog = program(Btf(everything().finish()), {"print": ADDRESS})
    assert prog.function("print").type_.is_variadic


def test_variables_that_btf_leaves_out_are_known_by_name():
    a = Assembler()
    a.int("unsigned long", 8)
    prog = program(Btf(a.finish()), {"zero_pfn": ADDRESS, "unheard_of": ADDRESS, "vmemmap_base": ADDRESS})
    assert prog["zero_pfn"].value_() == int.from_bytes(MEMORY[:8], "little")
    with pytest.raises(LookupError):
        prog.variable("unheard_of")


def test_where_struct_pages_begin():
    a = Assembler()
    a.struct("page", 64, [])
    prog = program(Btf(a.finish()), {"vmemmap_base": ADDRESS})
    assert prog["vmemmap"].value_() == int.from_bytes(MEMORY[:8], "little")
    assert prog["vmemmap"].type_.type_name() == "struct page *"
    with pytest.raises(LookupError):
        program(Btf(a.finish())).variable("vmemmap")


def test_btf_knows_no_files(prog):
    with pytest.raises(LookupError):
        prog.type("struct vma", "mm/vma.h")
    with pytest.raises(LookupError):
        prog.variable("jiffies", "kernel/time.c")


def test_types_without_an_end_are_refused():
    a = Assembler()
    a.int("unsigned long", 8)
    a.add(8, "ouroboros", 3)
    a.ptr(2)
    prog = program(Btf(a.finish()))
    with pytest.raises(KvirtError, match="no end"):
        prog.type("ouroboros")


def test_a_module_goes_on_where_the_kernel_ends():
    kernel = Assembler()
    number = kernel.int("unsigned long", 8)
    kernel.struct("page", 64, [("flags", number, 0)])
    base = Btf(kernel.finish())
    module = Assembler()
    # As pahole numbers them: types from the kernel's last, strings from the end of the kernel's.
    module.strings = b"zram\0table\0"
    name, member = len(kernel.strings), len(kernel.strings) + len("zram") + 1
    info = 4 << 24 | 1
    module.types.append(module.words(name, info, 16, member, 2, 64))
    btf = Btf(module.finish(), base)
    prog = program(btf)
    assert str(prog.type("struct zram")) == "struct zram {\n\tstruct page table;\n}"
    assert drgn.offsetof(prog.type("struct zram"), "table.flags") == 8


def test_symbols_out_of_proc_kallsyms():
    text = (
        b"0000000000000000 A fixed_percpu_data\n"
        b"ffffffff81000000 T _stext\n"
        b"ffffffff81000010 t copy\n"
        b"ffffffff81000010 t alias\n"
        b"ffffffff81000020 T copy_vma\n"
        b"ffffffff81000030 d copy\n"
        b"ffffffffc0000000 t copy_vma\t[module]\n"
    )
    table = ProcKallsyms(text)
    assert table
    finder, prog = _ByName(table.find), drgn.Program()
    assert [s.address & 0xFF for s in finder(prog, "copy", None, False)] == [0x10, 0x30]
    (first,) = finder(prog, "copy", None, True)
    assert (first.address & 0xFF, first.kind) == (0x10, drgn.SymbolKind.FUNC)
    # The next one tells how large it may be.
    assert first.size == 0x10
    (whole,) = finder(prog, "copy_vma", None, False)
    assert (whole.address, whole.binding) == (0xFFFFFFFF81000020, drgn.SymbolBinding.GLOBAL)
    assert finder(prog, "vma", None, False) == []
    assert finder(prog, "fixed_percpu_data", None, True)[0].address == 0


def with_vmcoreinfo(text: str) -> drgn.Program:
    prog = drgn.Program(drgn.host_platform)
    data = text.encode()
    prog.register_object_finder(
        "made up",
        lambda prog, name, flags, filename: (
            drgn.Object(prog, prog.array_type(prog.int_type("char", 1, True), len(data)), data)
            if name == "VMCOREINFO"
            else None
        ),
        enable_index=0,
    )
    return prog


def test_symbols_that_another_process_found():
    symbols = {"_stext": [(0xFFFFFFFF81000000, 16, 2, 2)], "zero_pfn": []}
    prog = with_vmcoreinfo("OSRELEASE=7.3\n")
    use_btf(prog, Btf(everything().finish()), symbols)
    found = prog.symbol("_stext")
    assert (found.address, found.size) == (0xFFFFFFFF81000000, 16)
    assert (found.binding, found.kind) == (drgn.SymbolBinding.GLOBAL, drgn.SymbolKind.FUNC)
    with pytest.raises(LookupError):
        prog.symbol("zero_pfn")
    # Of others it was not told, and nothing in this kernel tells of them.
    with pytest.raises(KvirtError, match="cannot be found without its vmlinux"):
        prog.symbol("init_mm")
    btf, known = used_btf(prog)
    assert known == symbols
    assert btf.named(Kind.STRUCT, "vma")


@pytest.mark.parametrize(
    ("vmcoreinfo", "words"),
    [
        ("OSRELEASE=7.3\n", "as Linux 6.0 and later do"),
        # It leads to where nothing is.
        ("OSRELEASE=7.3\nSYMBOL(kallsyms_names)=ffffffff82000000\n", "truncated or damaged"),
    ],
)
def test_symbols_that_cannot_be_read(vmcoreinfo, words, monkeypatch):
    class BadData(Exception):
        """As drgn's, which is no ValueError."""

    def fail(prog):
        raise BadData("Unexpected 3-byte length")

    monkeypatch.setattr("drgn.helpers.linux.kallsyms.load_vmlinux_kallsyms", fail)
    with pytest.raises(KvirtError, match=words):
        read_kallsyms(with_vmcoreinfo(vmcoreinfo))


def test_kinds_that_came_later_are_refused():
    a = Assembler()
    number = a.int("unsigned long", 8)
    a.layout = bytes(20 * 4) + bytes([0, 0, 0, 0])
    a.add(20, "later", number)
    a.struct("vma", 8, [("start", 2, 0)])
    prog = program(Btf(a.finish()))
    with pytest.raises(KvirtError, match="kind 20"):
        _ = prog.type("struct vma").members[0].type


def test_symbols_that_kptr_restrict_hides():
    assert not ProcKallsyms(b"0000000000000000 T _stext\n0000000000000000 T copy_vma\n")
    assert not ProcKallsyms(b"")


def test_what_another_process_does_takes_no_numpy():
    # It would import it beside the one that waits, and both would be late.
    words = "import sys, kvirt.finders, kvirt.layout; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0
