# SPDX-License-Identifier: GPL-2.0-only
import pytest

from kvirt.layout import Scheme
from kvirt.mm.vma import (
    VmaKind,
    displacement,
    linear_anon_page_index,
    linear_page_index,
    permissions,
    vma_is_cow_mapping,
    vma_is_temporary_stack,
    vma_kind,
    vma_reader,
)
from tests.unit.fake import Memory, make_layout

ADDRESS = 0xFFFF888000001000
SHMEM_OPS, FILE_OPS, FILE = 0xFFFFFFFF81000000, 0xFFFFFFFF82000000, 0xFFFF888000009000
READ, WRITE, EXEC, SHARED, MAYWRITE, MAYSHARE = 1, 2, 4, 8, 0x20, 0x80
GROWSDOWN, PFNMAP, SEQ, RAND, HUGETLB = 0x100, 0x400, 0x8000, 0x10000, 0x400000
PRIVATE = READ | WRITE | MAYWRITE


def make(scheme=Scheme.ANON_PGOFF, **values):
    layout = make_layout(scheme)
    memory = Memory()
    values = {"vm_start": 0x7F0000000000, "vm_end": 0x7F0000010000, "vm_flags": PRIVATE, **values}
    memory.put_struct(layout.vma, ADDRESS, values)
    return vma_reader(memory.prog, layout)(ADDRESS)


def test_both_halves_of_the_offset_count():
    vma = make(vm_pgoff=4, anon_pgoff_lo=0xF0000003, anon_pgoff_hi=7)
    assert vma.anon_pgoff == 0x7F0000003
    assert displacement(vma) == 3
    assert linear_anon_page_index(vma, 0x7F0000002000) == 0x7F0000005
    assert linear_page_index(vma, 0x7F0000002000) == 6


def test_legacy_folios_are_indexed_by_the_file_offset():
    vma = make(Scheme.LEGACY, vm_pgoff=4)
    assert vma.anon_pgoff == 4
    assert linear_anon_page_index(vma, 0x7F0000002000) == 6


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({}, VmaKind.ANON),
        ({"vm_flags": PRIVATE | GROWSDOWN}, VmaKind.STACK),
        ({"vm_file": FILE}, VmaKind.DEVZERO),
        ({"vm_file": FILE, "vm_ops": FILE_OPS}, VmaKind.FILE_PRIVATE),
        # A private mapping of a memfd is copied on write as any other file's.
        ({"vm_file": FILE, "vm_ops": SHMEM_OPS}, VmaKind.FILE_PRIVATE),
        ({"vm_file": FILE, "vm_ops": SHMEM_OPS, "vm_flags": READ | SHARED | MAYSHARE}, VmaKind.SHMEM),
        # Shared, of a file opened for reading: VM_SHARED is not set then.
        ({"vm_file": FILE, "vm_ops": SHMEM_OPS, "vm_flags": READ | MAYSHARE}, VmaKind.SHMEM),
        ({"vm_file": FILE, "vm_ops": FILE_OPS, "vm_flags": READ | SHARED | MAYSHARE}, VmaKind.FILE_SHARED),
        ({"vm_file": FILE, "vm_ops": FILE_OPS, "vm_flags": PRIVATE | HUGETLB}, VmaKind.HUGETLB),
        ({"vm_ops": FILE_OPS}, VmaKind.SPECIAL),
        ({"vm_file": FILE, "vm_ops": FILE_OPS, "vm_flags": PRIVATE | PFNMAP}, VmaKind.SPECIAL),
    ],
)
def test_kind(values, kind):
    assert vma_kind(make(**values)) is kind


def test_a_stack_that_does_not_grow_is_found_by_its_address():
    assert vma_kind(make(), start_stack=0x7F0000000010) is VmaKind.STACK
    assert vma_kind(make(), start_stack=0x7F0000010000) is VmaKind.ANON


def test_flags():
    assert permissions(make(vm_flags=READ | EXEC | MAYSHARE)) == "r-xs"
    assert permissions(make()) == "rw-p"
    assert vma_is_cow_mapping(make())
    assert not vma_is_cow_mapping(make(vm_flags=PRIVATE | SHARED))
    assert not vma_is_cow_mapping(make(vm_flags=READ | MAYSHARE))
    assert vma_is_temporary_stack(make(vm_flags=PRIVATE | GROWSDOWN | SEQ | RAND))
    assert not vma_is_temporary_stack(make(vm_flags=PRIVATE | GROWSDOWN | SEQ))
    assert not vma_is_temporary_stack(make(vm_flags=PRIVATE | SEQ | RAND))
