# SPDX-License-Identifier: GPL-2.0-only
"""A kernel's memory made up by hand: no kernel, no types, just bytes at addresses."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import drgn

from kvirt import pgtable
from kvirt.layout import (
    VM_FLAG_BITS,
    KsmLayout,
    Layout,
    MapleLayout,
    Member,
    PathLayout,
    Scheme,
    SpecialMappingLayout,
    StructLayout,
    SwapSpacesLayout,
    SwapTableLayout,
    SwapTypes,
    TreeLayout,
    swap_type_names,
)

VMEMMAP = 0xFFFFEA0000000000
SPECIAL_MAPPING_NAME = 0xFFFFFFFF81001000


def _layout(type_name: str, size: int, **offsets: int) -> StructLayout:
    return StructLayout(type_name, size, {name: Member(at, 8) for name, at in offsets.items()})


SWAP_INFO, SWAPPER_SPACES, NR_SWAPPER_SPACES = (0xFFFFFFFF82000000 + i * 0x1000 for i in range(3))
SWAP_TABLES = SwapTableLayout(
    SWAP_INFO,
    _layout("struct swap_info_struct", 16, max=0, cluster_info=8),
    _layout("struct swap_cluster_info", 16, table=8),
    512,
)
SWAP_SPACES = SwapSpacesLayout(
    SWAPPER_SPACES,
    NR_SWAPPER_SPACES,
    _layout("struct address_space", 16, xa_head=8),
    StructLayout("struct xa_node", 576, {"shift": Member(0, 1), "slots": Member(40, 512)}),
)


def make_layout(
    scheme: Scheme = Scheme.ANON_PGOFF,
    levels: int = 4,
    compound_mask: bool = False,
    tables: pgtable.PageTables | None = None,
) -> Layout:
    """A layout of eight-byte members in the order of their names here."""
    vma = [
        "vm_start",
        "vm_end",
        "vm_mm",
        "vm_flags",
        "anon_vma",
        "vm_ops",
        "vm_pgoff",
        "vm_file",
        "chain_next",
        "chain_prev",
        "anon_pgoff_lo",
        "anon_pgoff_hi",
    ]
    members = {name: Member(8 * i, 8) for i, name in enumerate(vma)}
    members["anon_pgoff_lo"] = Member(80, 4)
    members["anon_pgoff_hi"] = Member(84, 4)
    if scheme is Scheme.LEGACY:
        del members["anon_pgoff_lo"], members["anon_pgoff_hi"]
    page = StructLayout(
        "struct page",
        64,
        {
            "flags": Member(0, 8),
            "compound": Member(8, 8),
            "mapping": Member(24, 8),
            "index": Member(32, 8),
            "private": Member(40, 8),
            "mapcount": Member(48, 4),
        },
    )
    return Layout(
        release="7.3.0-made-up",
        arch="x86_64",
        scheme=scheme,
        pgtable=tables or pgtable.x86_64(levels, (1 << 52) - 1),
        vmemmap=VMEMMAP,
        vma=StructLayout("struct vm_area_struct", 128, members),
        mm=_layout(
            "struct mm_struct",
            80,
            ma_root=0,
            map_count=8,
            mm_users=16,
            pgd=24,
            start_stack=32,
            start_brk=40,
            brk=48,
            flags=56,
            mmap_lock_count=64,
        ),
        avc=_layout("struct anon_vma_chain", 64, vma=0, anon_vma=8, same_vma_next=16, same_vma_prev=24),
        anon_vma=StructLayout(
            "struct anon_vma",
            64,
            {
                "root": Member(0, 8),
                "parent": Member(8, 8),
                "refcount": Member(16, 8),
                "rb_root": Member(24, 16),
                "rwsem_count": Member(40, 8),
                "num_children": Member(48, 8),
                "num_active_vmas": Member(56, 8),
            },
        ),
        anon_tree=TreeLayout(32, 56, 0, 8, 16, 0, 8, 32),
        file_tree=TreeLayout(96, 120, 0, 8, 16, 0, 8, 32),
        file=_layout("struct file", 8, f_mapping=0),
        mapping=_layout("struct address_space", 32, i_mmap=0, rwsem_count=16, host=24),
        inode=_layout("struct inode", 16, i_blkbits=0, i_flags=8),
        page=page,
        large_counts={
            "nr_pages": Member(60, 4),
            "large_mapcount": Member(16, 4),
            "entire_mapcount": Member(24, 4),
        },
        compound_mask=compound_mask,
        # Sixteen and ten slots, as the kernel has them on 64 bits.
        maple=MapleLayout(32, slice(1, 16), slice(16, 32), 248, slice(1, 10), slice(10, 20), 240),
        vm={name: 1 << bit for name, bit in VM_FLAG_BITS.items()},
        pg_hwpoison=1 << 20,
        pg_head=1 << 6,
        pg_locked=1 << 0,
        pg_anon_exclusive=1 << 11,
        pg_double_map=0,
        zero_pfn=0x99,
        zero_pages=1,
        huge_zero_pfn_address=None,
        swap_types=SwapTypes(swap_type_names(24, True)),
        swp_pfn_mask=(1 << 34) - 1,
        swap_cache=SWAP_TABLES,
        ksm=KsmLayout(
            _layout("struct ksm_stable_node", 24, first=0, kpfn=8, rmap_hlist_len=16),
            _layout(
                "struct ksm_rmap_item",
                48,
                anon_vma=0,
                mm=8,
                address=16,
                linear_page_index=24,
                head=32,
                next=40,
            ),
        ),
        shmem_ops=frozenset({0xFFFFFFFF81000000}),
        path=PathLayout(
            _layout("struct file", 24, dentry=8, mnt=16),
            StructLayout(
                "struct dentry",
                48,
                {
                    "d_inode": Member(40, 8),
                    "pprev": Member(0, 8),
                    "d_parent": Member(8, 8),
                    "len": Member(20, 4),
                    "name": Member(24, 8),
                    "d_op": Member(32, 8),
                },
            ),
            _layout("struct mount", 40, mnt_parent=8, mnt_mountpoint=16, mnt=24, mnt_root=24),
            _layout("struct dentry_operations", 16, d_dname=8),
            _layout("struct inode", 72, i_ino=64),
        ),
        special_mapping=SpecialMappingLayout(
            SPECIAL_MAPPING_NAME,
            _layout("struct vm_area_struct", 128, vm_private_data=88),
            _layout("struct vm_operations_struct", 16, name=8),
            _layout("struct vm_special_mapping", 16, name=0),
        ),
        anon_name=4,
        dontunmap_resets_pgoff=True,
        hugetlb_index_in_pages=True,
    )


class Memory:
    """Bytes at virtual and physical addresses, as a drgn program."""

    def __init__(self) -> None:
        self.prog = drgn.Program(
            drgn.Platform(
                drgn.Architecture.X86_64,
                drgn.PlatformFlags.IS_LITTLE_ENDIAN | drgn.PlatformFlags.IS_64_BIT,
            )
        )

    def put(self, address: int, data: bytes, *, physical: bool = False) -> None:
        """Lay bytes at an address; later ones hide earlier ones."""
        self.prog.add_memory_segment(
            address, len(data), lambda at, count, offset, is_physical: data[offset : offset + count], physical
        )

    def put_words(self, address: int, words: list[int], *, physical: bool = False) -> None:
        """Lay 64-bit words at an address."""
        self.put(address, struct.pack(f"<{len(words)}Q", *words), physical=physical)

    def put_struct(self, layout: StructLayout, address: int, values: Mapping[str, int]) -> None:
        """Lay a structure at an address; members not named are 0."""
        data = bytearray(layout.size)
        for name, value in values.items():
            member = layout.members[name]
            data[member.offset : member.offset + member.size] = value.to_bytes(member.size, "little")
        self.put(address, bytes(data))
