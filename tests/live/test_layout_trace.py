# SPDX-License-Identifier: GPL-2.0-only
"""What a guest's BTF tells is what drgn finds in the debug information of the same kernel."""

import json

import drgn
import pytest

from kvirt.layout import VM_FLAG_BITS

PATIENCE = 120

# Run in the guest: its BTF is not a copy of what the host has.
READ = """
import dataclasses, json, sys
from kvirt.btf import kernel_btf
from kvirt.layout_trace import read_trace_layout
document = dataclasses.asdict(read_trace_layout(kernel_btf()))
document["imported"] = [name for name in ("drgn", "numpy") if name in sys.modules]
print(json.dumps(document))
"""

# What each constant is the offset of.
MEMBERS = {
    "KV_VMA_START": ("vm_area_struct", "vm_start"),
    "KV_VMA_END": ("vm_area_struct", "vm_end"),
    "KV_VMA_MM": ("vm_area_struct", "vm_mm"),
    "KV_VMA_FLAGS": ("vm_area_struct", "vm_flags"),
    "KV_VMA_CHAIN": ("vm_area_struct", "anon_vma_chain"),
    "KV_VMA_ANON_VMA": ("vm_area_struct", "anon_vma"),
    "KV_VMA_OPS": ("vm_area_struct", "vm_ops"),
    "KV_VMA_PGOFF": ("vm_area_struct", "vm_pgoff"),
    "KV_VMA_FILE": ("vm_area_struct", "vm_file"),
    "KV_VMA_ANON_LO": ("vm_area_struct", "__vm_anon_pgoff_lo"),
    "KV_VMA_ANON_HI": ("vm_area_struct", "__vm_anon_pgoff_hi"),
    "KV_FOLIO_MAPPING": ("folio", "mapping"),
    "KV_FOLIO_INDEX": ("folio", "index"),
    "KV_ANON_VMA_ROOT": ("anon_vma", "root"),
    "KV_ANON_VMA_CHILDREN": ("anon_vma", "num_children"),
    "KV_RWC_RMAP_ONE": ("rmap_walk_control", "rmap_one"),
    "KV_MM_OWNER": ("mm_struct", "owner"),
    "KV_TASK_TGID": ("task_struct", "tgid"),
    "KV_TASK_PID": ("task_struct", "pid"),
    "KV_TASK_COMM": ("task_struct", "comm"),
    "KV_TASK_LEADER": ("task_struct", "group_leader"),
    "KV_TASK_CGROUPS": ("task_struct", "cgroups"),
    "KV_CSS_SET_CGROUP": ("css_set", "dfl_cgrp"),
    "KV_CGROUP_LEVEL": ("cgroup", "level"),
    "KV_CGROUP_ANCESTORS": ("cgroup", "ancestors"),
    "KV_CGROUP_KN": ("cgroup", "kn"),
    "KV_KN_ID": ("kernfs_node", "id"),
    "KV_VP_VMA": ("vma_prepare", "vma"),
    "KV_VP_INSERT": ("vma_prepare", "insert"),
    "KV_REGISTER_RETURN": ("pt_regs", "ax"),
    **{
        f"KV_REGISTER_ARGUMENT_{number}": ("pt_regs", name)
        for number, name in enumerate(("di", "si", "dx", "cx", "r8", "r9"))
    },
}
FLAGS = {
    "KV_VM_SHARED": ("SHARED",),
    "KV_VM_MAYWRITE": ("MAYWRITE",),
    "KV_VM_GROWSDOWN": ("GROWSDOWN",),
    "KV_VM_STACK_SETUP": ("RAND_READ", "SEQ_READ"),
}
ONLY_ANON_PGOFF = {"KV_VMA_ANON_LO", "KV_VMA_ANON_HI"}
# mm/rmap.c, mm/migrate.c: of every kernel that has folios.
CALLBACKS = {
    "folio_referenced_one",
    "page_mkclean_one",
    "try_to_unmap_one",
    "try_to_migrate_one",
    "remove_migration_pte",
}


@pytest.fixture(scope="module", params=["guest73", "legacy_guest"])
def guest(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def layout(guest):
    done = guest.run(["python3", "-"], timeout=PATIENCE, check=True, input=READ)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def dwarf(guest):
    prog = drgn.Program(drgn.host_platform)
    prog.extra_module("vmlinux", create=True).try_file(guest.kernel.vmlinux)
    return prog


def test_nothing_is_missing(layout):
    assert layout["absent"] == {}
    assert layout["missing"] == {}
    assert layout["imported"] == []


def test_offsets(layout, dwarf):
    legacy = layout["scheme"] == "legacy"
    expected = {
        constant: drgn.offsetof(dwarf.type(f"struct {struct}"), member)
        for constant, (struct, member) in MEMBERS.items()
        if not (legacy and constant in ONLY_ANON_PGOFF)
    }
    assert dwarf.type("struct vm_area_struct").has_member("__vm_anon_pgoff_lo") is not legacy
    constants = dict(layout["constants"])
    assert {name: constants.pop(name) for name in expected} == expected
    assert constants.pop("KV_LEGACY") == legacy
    assert constants.pop("KV_REGISTERS_SIZE") == drgn.sizeof(dwarf.type("struct pt_regs"))
    ends = [
        offset + drgn.sizeof(dwarf.type("struct vm_area_struct").member(MEMBERS[name][1]).type)
        for name, offset in expected.items()
        if MEMBERS[name][0] == "vm_area_struct"
    ]
    assert constants.pop("KV_VMA_SIZE") == (max(ends) + 7) // 8 * 8
    assert set(constants) == set(FLAGS)


def test_flags(layout, dwarf):
    for constant, names in FLAGS.items():
        bits = [VM_FLAG_BITS[name] for name in names]
        if layout["scheme"] != "legacy":
            bits = [dwarf.constant(f"VMA_{name}_BIT").value_() for name in names]
        assert layout["constants"][constant] == sum(1 << bit for bit in bits)


def test_arguments(layout, dwarf):
    for function, positions in layout["arguments"].items():
        names = [parameter.name for parameter in dwarf.function(function).type_.parameters]
        assert [names[position] for position in positions.values()] == list(positions)
    assert ("anon_pgoff" in layout["arguments"]["copy_vma"]) is (layout["scheme"] != "legacy")


def test_callbacks(layout, dwarf):
    assert set(layout["callbacks"]) >= CALLBACKS
    for name in layout["callbacks"]:
        types = [parameter.type.type_name() for parameter in dwarf.function(name).type_.parameters]
        assert types == ["struct folio *", "struct vm_area_struct *", "unsigned long", "void *"]
