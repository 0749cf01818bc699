# SPDX-License-Identifier: GPL-2.0-only
"""What this kernel looks like: scheme, member offsets, page geometry.

This module, by debug information, and kvirt.layout_trace, by BTF, are the only ones that ask "does this
kernel have ...?". They decide by types, members, symbols and prototypes, never by version number.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING

import drgn

from kvirt.architecture import check_architecture
from kvirt.errors import KvirtError
from kvirt.pgtable import PageTables, arm64, x86_64
from kvirt.scheme import VM_FLAG_BITS, Scheme, detect_scheme
from kvirt.snapshot import Readable
from kvirt.vmcoreinfo import vmcoreinfo_number

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Member:
    """Where a member lies in its structure, in bytes."""

    offset: int
    size: int


Values = Callable[[bytes], tuple[int, ...]]
# Of struct, by size.
_FORMATS = {1: "B", 2: "H", 4: "I", 8: "Q"}


def _getter(members: Mapping[str, Member], names: Sequence[str]) -> Values:
    """A function that takes members out of a structure's bytes, all at once if struct can do it."""
    order = sorted(names, key=lambda name: members[name].offset)
    format_, end = "<", 0
    for name in order:
        member = members[name]
        if member.offset < end or member.size not in _FORMATS:
            spans = [(members[n].offset, members[n].offset + members[n].size) for n in names]
            return lambda data: tuple(int.from_bytes(data[a:b], "little") for a, b in spans)
        format_ += f"{member.offset - end}x{_FORMATS[member.size]}"
        end = member.offset + member.size
    unpack: Values = struct.Struct(format_).unpack_from
    if order == list(names):
        return unpack
    pick = itemgetter(*(order.index(name) for name in names))
    return lambda data: pick(unpack(data))


_NONE: Mapping[str, int] = {}


class StructLayout:
    """Offsets of the members of one structure, and how to decode its bytes.

    A name that this kernel's structure lacks is absent from the decoded mapping.
    """

    def __init__(self, type_name: str, size: int, members: Mapping[str, Member]) -> None:
        self.type_name = type_name
        self.size = size
        self.members = dict(members)
        self._names = tuple(self.members)
        self._getters: dict[tuple[str, ...], Values] = {}
        self._dtypes: dict[tuple[object, ...], np.dtype[np.void]] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return StructLayout, (self.type_name, self.size, self.members)

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def offset(self, name: str) -> int:
        """Offset of a member, in bytes."""
        return self.members[name].offset

    def decode(self, data: bytes) -> dict[str, int]:
        """Unsigned little-endian values of all members, by name."""
        return dict(zip(self._names, self.getter(self._names)(data), strict=True))

    def getter(self, names: tuple[str, ...]) -> Values:
        """A function from the structure's bytes to unsigned values of some members, in this order."""
        getter = self._getters.get(names)
        if getter is None:
            getter = self._getters[names] = _getter(self.members, names)
        return getter

    def dtype(self, names: tuple[str, ...], more: Mapping[str, int] = _NONE) -> np.dtype[np.void]:
        """The structure as a record of numpy with some of its members, unsigned.

        :param names: of members with 1, 2, 4 or 8 bytes
        :param more: names and offsets of other members with 8 bytes
        """
        key = names, tuple(more.items())
        if key not in self._dtypes:
            # As for Layout.page_dtype.
            import numpy as np

            places = {name: self.members[name] for name in names}
            places |= {name: Member(offset, 8) for name, offset in more.items()}
            self._dtypes[key] = np.dtype(
                {
                    "names": list(places),
                    "formats": [f"<u{member.size}" for member in places.values()],
                    "offsets": [member.offset for member in places.values()],
                    "itemsize": self.size,
                }
            )
        return self._dtypes[key]

    def read(self, memory: Readable, address: int) -> dict[str, int]:
        """Read the structure at a virtual address with one read.

        :raises drgn.FaultError: if it cannot be read
        """
        return self.decode(memory.read(address, self.size))

    def read_member(self, memory: Readable, address: int, name: str) -> int:
        """Read one member of the structure at a virtual address, where the rest of it is of no interest.

        :raises drgn.FaultError: if it cannot be read
        """
        member = self.members[name]
        where = (address + member.offset) & ((1 << 64) - 1)
        return int.from_bytes(memory.read(where, member.size), "little")


def _resolve(type_: drgn.Type, path: str) -> Member | None:
    """Find ``a.b.c`` in a structure, through anonymous members."""
    bits = 0
    for name in path.split("."):
        while type_.kind == drgn.TypeKind.TYPEDEF:
            type_ = type_.type
        if type_.kind not in (drgn.TypeKind.STRUCT, drgn.TypeKind.UNION, drgn.TypeKind.CLASS):
            return None
        try:
            member = type_.member(name)
        except LookupError:
            return None
        bits += member.bit_offset
        type_ = member.type
    return Member(bits // 8, drgn.sizeof(type_))


def _unknown(what: str) -> KvirtError:
    return KvirtError(
        f"{what}: this version of kvirt does not know such a kernel; please report its version."
    )


def _struct(
    prog: drgn.Program,
    type_name: str,
    required: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]] | None = None,
) -> StructLayout:
    """Lay out a structure; each member has one or more spellings, of which the first found counts."""
    try:
        type_ = prog.type(type_name)
    except LookupError:
        raise KvirtError(
            f"This kernel's type information has no {type_name}: give the vmlinux with full debug "
            "information of this very kernel with --symbols."
        ) from None
    members = {}
    for name, paths in {**required, **(optional or {})}.items():
        found = next((m for m in (_resolve(type_, p) for p in paths) if m is not None), None)
        if found is not None:
            members[name] = found
        elif name in required:
            raise _unknown(f"{type_name} of this kernel has no member {' or '.join(paths)}")
    return StructLayout(type_name, type_.size or 0, members)


# include/linux/mm_types.h (include/linux/sched/coredump.h before 7.0)
MMF_UNSTABLE = 1 << 22
# include/linux/sched.h
PF_KTHREAD = 0x00200000
# kernel/locking/rwsem.c
RWSEM_WRITER_LOCKED = 1
# And readers, of which each counts 256; between are waiters.
RWSEM_LOCK_MASK = 1 | ~0xFF
# include/linux/fs.h
S_DAX = 1 << 13


@dataclass(frozen=True)
class MapleLayout:
    """struct maple_node, include/linux/maple_tree.h; offsets in 64-bit words."""

    node_words: int
    range_pivots: slice
    range_slots: slice
    range_meta_end: int
    """Byte offset of ``mr64.meta.end``."""
    arange_pivots: slice
    arange_slots: slice
    arange_meta_end: int
    """Byte offset of ``ma64.meta.end``."""


@dataclass(frozen=True)
class TreeLayout:
    """An interval tree whose nodes are members of a structure; offsets in bytes."""

    rb: int
    """Of the ``struct rb_node`` in the structure."""
    subtree_last: int
    """Of ``rb_subtree_last`` in the structure."""
    parent: int
    """Of ``__rb_parent_color`` in ``struct rb_node``, and so on."""
    left: int
    right: int
    root_node: int
    """Of the top node's pointer in ``struct rb_root_cached``, and so on."""
    root_leftmost: int
    span: int
    """Bytes from the node to the end of what belongs to it."""


@dataclass(frozen=True)
class SwapTypes:
    """How the swap types above MAX_SWAPFILES are used (include/linux/swap.h)."""

    names: tuple[str, ...]
    """Name of each of the 32 swap types: "swap", "hwpoison", "migration", "device-private",
    "device-exclusive" or "marker"."""


@dataclass(frozen=True)
class SwapTableLayout:
    """The swap cache as a table for each cluster of a swap area (mm/swap_table.h)."""

    swap_info: int
    """Address of the array of pointers to swap_info_struct."""
    info: StructLayout
    cluster: StructLayout
    slots: int
    """Pages of a cluster (SWAPFILE_CLUSTER)."""


@dataclass(frozen=True)
class SwapSpacesLayout:
    """The swap cache as several struct address_space for each swap area (mm/swap_state.c)."""

    swapper_spaces: int
    """Address of the array of pointers to a swap area's address spaces."""
    nr_swapper_spaces: int
    """Address of the array of their numbers, 32 bits each."""
    space: StructLayout
    node: StructLayout
    """struct xa_node, with 64 slots from member "slots" on."""


@dataclass(frozen=True)
class KsmLayout:
    """Where KSM keeps the index of a page that it merged (mm/ksm.c)."""

    stable_node: StructLayout
    rmap_item: StructLayout


@dataclass(frozen=True)
class PathLayout:
    """What the path of a file is put together from (fs/d_path.c)."""

    file: StructLayout
    """The ``f_path`` of struct file."""
    dentry: StructLayout
    mount: StructLayout
    """struct mount, with the offset of its struct vfsmount as "mnt"."""
    operations: StructLayout
    """struct dentry_operations"""
    inode: StructLayout
    """struct inode, whose number is the name of a socket."""


@dataclass(frozen=True)
class SpecialMappingLayout:
    """What the kernel calls mappings that it made of its own pages (mm/mmap.c: special_mapping_name())."""

    function: int
    """Address of ``special_mapping_name()``, by which their operations are told."""
    vma: StructLayout
    operations: StructLayout
    """struct vm_operations_struct"""
    mapping: StructLayout
    """struct vm_special_mapping"""


@dataclass(frozen=True)
class PrintkLayout:
    """The kernel's log (kernel/printk/printk_ringbuffer.h)."""

    prb: int
    """Address of the pointer to the ring."""
    ring: StructLayout
    desc: StructLayout
    info: StructLayout


@dataclass(frozen=True)
class Layout:
    """Everything about this kernel's structures that kvirt needs."""

    release: str
    arch: str
    scheme: Scheme
    pgtable: PageTables
    vmemmap: int
    """Address of the struct page of page frame 0."""
    vma: StructLayout
    mm: StructLayout
    avc: StructLayout
    anon_vma: StructLayout
    anon_tree: TreeLayout
    """``anon_vma->rb_root``, whose nodes are in AVCs."""
    file_tree: TreeLayout
    """``mapping->i_mmap``, whose nodes are in VMAs."""
    file: StructLayout
    mapping: StructLayout
    """struct address_space: the pages of a file."""
    inode: StructLayout
    page: StructLayout
    large_counts: Mapping[str, Member]
    """What this kernel has in the second struct page of a large folio, and where in it: some of "nr_pages",
    "large_mapcount" and "entire_mapcount"."""
    compound_mask: bool
    """Tail pages hold a mask rather than a pointer (``compound_info_has_mask``)."""
    maple: MapleLayout
    vm: Mapping[str, int]
    """``VM_...`` masks by name without the prefix."""
    pg_hwpoison: int
    """Mask of ``PG_hwpoison`` in page flags, 0 if the kernel has none."""
    pg_head: int
    """Mask of ``PG_head``: the first page of a large folio."""
    pg_locked: int
    """Mask of ``PG_locked``."""
    pg_anon_exclusive: int
    """Mask of ``PG_anon_exclusive``, 0 if the kernel has none (before 5.19)."""
    pg_double_map: int
    """Mask of ``PG_double_map`` in the flags of the second page, 0 if the kernel has none (6.2 and later)."""
    zero_pfn: int | None
    zero_pages: int
    huge_zero_pfn_address: int | None
    """Where the kernel keeps the huge zero folio's page frame; it comes and goes."""
    swap_types: SwapTypes
    swp_pfn_mask: int
    """Bits of a swap offset that are a page frame (``SWP_PFN_MASK``)."""
    swap_cache: SwapTableLayout | SwapSpacesLayout | None
    """None if the kernel has no swap, or a swap cache that this version of kvirt does not know."""
    ksm: KsmLayout | None
    """None if KSM does not remember the index of what it merges (Linux 7.2 and earlier)."""
    shmem_ops: frozenset[int]
    """Addresses of the vm_operations_struct of shmem mappings."""
    path: PathLayout | None
    """None if the types lack a part of it: then files have no names."""
    special_mapping: SpecialMappingLayout | None
    """None if the types or symbols lack a part of it."""
    anon_name: int | None
    """Offset of the string in struct anon_vma_name; None if the kernel has none."""
    dontunmap_resets_pgoff: bool
    """mremap(MREMAP_DONTUNMAP) makes an emptied source natural again."""
    hugetlb_index_in_pages: bool
    """hugetlb folios are indexed in base pages, as all others (Linux 6.7 and later)."""

    @property
    def pg_known(self) -> int:
        """Mask of all page flags that have a name here: nobody can ask for others."""
        some = self.pg_hwpoison | self.pg_head | self.pg_locked
        return some | self.pg_anon_exclusive | self.pg_double_map

    @cached_property
    def page_dtype(self) -> np.dtype[np.void]:
        """All of a struct page that kvirt reads; *large_counts* mean something in second pages only."""
        # It takes long to import, and whoever only learns what a kernel looks like does without.
        import numpy as np

        formats = {8: "<u8", 4: "<i4"}
        members = {**self.page.members, **self.large_counts}
        return np.dtype(
            {
                "names": list(members),
                "formats": [formats[m.size] for m in members.values()],
                "offsets": [m.offset for m in members.values()],
                "itemsize": self.page.size,
            }
        )

    @cached_property
    def page_shift(self) -> int:
        """``PAGE_SHIFT``"""
        return self.pgtable.page_shift

    @property
    def page_size(self) -> int:
        """Bytes of a base page."""
        return 1 << self.page_shift


def _variable(prog: drgn.Program, name: str) -> drgn.Object | None:
    try:
        return prog.variable(name)
    except LookupError:
        return None


def _address(prog: drgn.Program, name: str) -> int | None:
    try:
        address: int = prog.symbol(name).address
        return address
    except LookupError:
        obj = _variable(prog, name)
        return None if obj is None else obj.address_


def _has_function(prog: drgn.Program, name: str) -> bool:
    try:
        prog.function(name)
    except LookupError:
        return _address(prog, name) is not None
    return True


def _number(prog: drgn.Program, name: str, size: int = 8) -> int | None:
    """Value of an integer variable, also where only its symbol is known."""
    obj = _variable(prog, name)
    if obj is not None:
        return int(obj.value_())
    address = _address(prog, name)
    return None if address is None else int.from_bytes(prog.read(address, size), "little")


def _copy_vma_parameters(prog: drgn.Program) -> list[str] | None:
    try:
        return [p.name or "" for p in prog.function("copy_vma").type_.parameters]
    except LookupError:
        return None


def _member_names(type_: drgn.Type) -> list[str]:
    names: list[str] = []
    for member in type_.members or ():
        if member.name is None:
            names += _member_names(member.type)
        else:
            names.append(member.name)
    return names


def swap_type_names(max_swapfiles: int, hwpoison: bool) -> tuple[str, ...]:
    """Name the 32 swap types from MAX_SWAPFILES, following include/linux/swap.h.

    From MAX_SWAPFILES upwards: hwpoison (1, with memory failure handling), migration (3), device-private
    (2) and device-exclusive (1; 2 before 6.15) if there are device pages, and the PTE marker as the last.
    From 5.19 to 6.1 an error of swapping in was a type of its own behind that, and is no page either.
    """
    total = 1 << 5
    names = ["swap"] * max_swapfiles
    if hwpoison:
        names.append("hwpoison")
    names += ["migration"] * 3
    # The types that are left are those of devices, of which there are 0, 3 or 4, and one marker or two.
    devices, markers = {1: (0, 1), 2: (0, 2), 4: (3, 1), 5: (4, 1), 6: (4, 2)}.get(total - len(names), (0, 0))
    if markers == 0:
        raise KvirtError(
            f"This kernel has {max_swapfiles} swap types, which this version of kvirt does not know "
            "how to read; please report its version."
        )
    if devices:
        names += ["device-private"] * 2 + ["device-exclusive"] * (devices - 2)
    return (*names, *["marker"] * markers)


def _max_swapfiles(prog: drgn.Program, hwpoison: bool) -> int:
    """MAX_SWAPFILES: the length of swap_info[].

    :raises KvirtError: if it cannot be told
    """
    swap_info = _variable(prog, "swap_info")
    if swap_info is not None and swap_info.type_.length:
        return int(swap_info.type_.length)
    # mm/rmap.c has these with CONFIG_DEVICE_PRIVATE; the first, until 6.15, made entries of two types.
    devices = 0
    if _has_function(prog, "make_device_exclusive_range"):
        devices = 4
    elif _has_function(prog, "make_device_exclusive"):
        devices = 3
    most = 32 - 4 - hwpoison - devices
    if swap_info is None:
        # mm/swapfile.c
        if _has_function(prog, "si_swapinfo"):
            raise KvirtError(
                "This kernel can swap, and its swap_info cannot be found, so that the types of swap entries "
                "cannot be told: give its vmlinux with --symbols."
            )
        # Without CONFIG_SWAP there are no swap entries proper; migration entries still exist.
        return most
    # Without debug information: the symbol's size, which is at least that.
    for length in (most, most - 1):
        if prog.symbol("swap_info").size // 8 == length:
            return length
    raise KvirtError(
        f"The swap types of this kernel cannot be told without its debug information (swap_info[] has "
        f"{prog.symbol('swap_info').size} bytes): give its vmlinux with --symbols, and report its version."
    )


def _maple(prog: drgn.Program) -> MapleLayout:
    paths = [f"{kind}.{name}" for kind in ("mr64", "ma64") for name in ("pivot", "slot", "meta.end")]
    node = _struct(prog, "struct maple_node", {path: [path] for path in paths})

    def words(path: str) -> slice:
        member = node.members[path]
        return slice(member.offset // 8, (member.offset + member.size) // 8)

    maple = MapleLayout(
        node_words=node.size // 8,
        range_pivots=words("mr64.pivot"),
        range_slots=words("mr64.slot"),
        range_meta_end=node.offset("mr64.meta.end"),
        arange_pivots=words("ma64.pivot"),
        arange_slots=words("ma64.slot"),
        arange_meta_end=node.offset("ma64.meta.end"),
    )
    for pivots, slots in (
        (maple.range_pivots, maple.range_slots),
        (maple.arange_pivots, maple.arange_slots),
    ):
        # Between the slots are the pivots.
        if slots.stop - slots.start != pivots.stop - pivots.start + 1 or slots.stop > maple.node_words:
            raise _unknown("struct maple_node does not have one slot more than pivots")
    return maple


def _tree(prog: drgn.Program, type_name: str, rb: str, subtree_last: str) -> TreeLayout:
    owner = _struct(prog, type_name, {"rb": [rb], "last": [subtree_last]})
    node = _struct(
        prog,
        "struct rb_node",
        {"parent": ["__rb_parent_color"], "left": ["rb_left"], "right": ["rb_right"]},
    )
    root = _struct(prog, "struct rb_root_cached", {"node": ["rb_root.rb_node"], "leftmost": ["rb_leftmost"]})
    return TreeLayout(
        rb=owner.offset("rb"),
        subtree_last=owner.offset("last"),
        parent=node.offset("parent"),
        left=node.offset("left"),
        right=node.offset("right"),
        root_node=root.offset("node"),
        root_leftmost=root.offset("leftmost"),
        span=owner.offset("last") - owner.offset("rb") + 8,
    )


def _vm_flags(prog: drgn.Program) -> dict[str, int]:
    flags = {}
    for name, bit in VM_FLAG_BITS.items():
        try:
            flags[name] = 1 << int(prog.constant(f"VMA_{name}_BIT").value_())
        except LookupError:
            flags[name] = 1 << bit
    return flags


def _vma(prog: drgn.Program, scheme: Scheme) -> StructLayout:
    required = {
        name: [name]
        for name in (
            "vm_start",
            "vm_end",
            "vm_mm",
            "vm_flags",
            "anon_vma",
            "vm_ops",
            "vm_pgoff",
            "vm_file",
        )
    }
    required["chain_next"] = ["anon_vma_chain.next"]
    required["chain_prev"] = ["anon_vma_chain.prev"]
    style = {Scheme.ANON_PGOFF: "anon", Scheme.VIRT_PGOFF: "virt"}.get(scheme)
    if style is not None:
        required["anon_pgoff_lo"] = [f"__vm_{style}_pgoff_lo"]
        required["anon_pgoff_hi"] = [f"__vm_{style}_pgoff_hi"]
    layout = _struct(prog, "struct vm_area_struct", required, {"anon_name": ["anon_name"]})
    # Between 5.17 and 6.1 the name shares its place with the file mapping's tree node.
    shared = _resolve(prog.type("struct vm_area_struct"), "shared")
    if shared is not None and layout.members.get("anon_name", Member(-1, 0)).offset == shared.offset:
        del layout.members["anon_name"]
    return StructLayout(layout.type_name, layout.size, layout.members)


def _large(prog: drgn.Program) -> dict[str, Member]:
    """Counts of a large folio, by offset within its second struct page."""
    members = {}
    folio, page = prog.type("struct folio"), prog.type("struct page")
    page_size = page.size or 0
    for name, paths in {
        "nr_pages": ("_nr_pages", "_folio_nr_pages"),
        "large_mapcount": ("_large_mapcount.counter",),
        "entire_mapcount": ("_entire_mapcount.counter",),
    }.items():
        found = next((m for m in (_resolve(folio, p) for p in paths) if m is not None), None)
        if found is not None and page_size <= found.offset < 2 * page_size:
            members[name] = Member(found.offset - page_size, found.size)
    # Before 6.2: mm/rmap.c counted the mappings of the whole here.
    compound = _resolve(page, "compound_mapcount.counter")
    if "entire_mapcount" not in members and compound is not None:
        members["entire_mapcount"] = compound
    return members


def _page(prog: drgn.Program) -> StructLayout:
    # "mapping" and "index" lie at the same offsets in struct page and struct folio; a folio's are
    # those of its first page.
    return _struct(
        prog,
        "struct page",
        {
            "flags": ["flags.f", "flags"],
            "compound": ["compound_info", "compound_head"],
            "mapping": ["mapping"],
            "index": ["__folio_index", "index"],
            "private": ["private"],
            "mapcount": ["_mapcount.counter"],
        },
    )


def _swap_cache(prog: drgn.Program) -> SwapTableLayout | SwapSpacesLayout | None:
    """Tell how swap entries find their folios: a swap table in each cluster (6.18), or xarrays."""
    try:
        if prog.type("struct swap_cluster_info").has_member("table"):
            swap_info = _address(prog, "swap_info")
            if swap_info is None:
                return None
            entries = prog.type("struct swap_table").member("entries").type
            return SwapTableLayout(
                swap_info,
                _struct(prog, "struct swap_info_struct", {"max": ["max"], "cluster_info": ["cluster_info"]}),
                _struct(prog, "struct swap_cluster_info", {"table": ["table"]}),
                entries.length or 0,
            )
        spaces, numbers = _address(prog, "swapper_spaces"), _address(prog, "nr_swapper_spaces")
        if spaces is None or numbers is None:
            return None
        return SwapSpacesLayout(
            spaces,
            numbers,
            _struct(prog, "struct address_space", {"xa_head": ["i_pages.xa_head"]}),
            _struct(prog, "struct xa_node", {"shift": ["shift"], "slots": ["slots"]}),
        )
    except LookupError:
        return None


def _ksm(prog: drgn.Program) -> KsmLayout | None:
    try:
        if not prog.type("struct ksm_rmap_item").has_member("linear_page_index"):
            return None
    except LookupError:
        return None
    return KsmLayout(
        _struct(
            prog,
            "struct ksm_stable_node",
            {"first": ["hlist.first"], "kpfn": ["kpfn"], "rmap_hlist_len": ["rmap_hlist_len"]},
        ),
        _struct(
            prog,
            "struct ksm_rmap_item",
            {
                "anon_vma": ["anon_vma"],
                "mm": ["mm"],
                "address": ["address"],
                "linear_page_index": ["linear_page_index"],
                "head": ["head"],
                "next": ["hlist.next"],
            },
        ),
    )


def _path(prog: drgn.Program) -> PathLayout | None:
    try:
        return PathLayout(
            _struct(prog, "struct file", {"dentry": ["f_path.dentry"], "mnt": ["f_path.mnt"]}),
            _struct(
                prog,
                "struct dentry",
                {
                    "d_parent": ["d_parent"],
                    "pprev": ["d_hash.pprev"],
                    "d_op": ["d_op"],
                    "d_inode": ["d_inode"],
                    "name": ["d_name.name"],
                    "len": ["d_name.len"],
                },
            ),
            _struct(
                prog,
                "struct mount",
                {
                    "mnt": ["mnt"],
                    "mnt_root": ["mnt.mnt_root"],
                    "mnt_parent": ["mnt_parent"],
                    "mnt_mountpoint": ["mnt_mountpoint"],
                },
            ),
            _struct(prog, "struct dentry_operations", {"d_dname": ["d_dname"]}),
            _struct(prog, "struct inode", {"i_ino": ["i_ino"]}),
        )
    except KvirtError:
        # A name is a courtesy.
        return None


_DNAMES_KEY = "kvirt.dnames"
# The most frequent first: to look for a symbol takes a millisecond or two.
_DNAMES = ("simple_dname", "anon_inodefs_dname", "sockfs_dname")


def dname_function(prog: drgn.Program, address: int) -> str | None:
    """Name of a function that names files that no directory has (``dentry->d_op->d_dname``).

    It is looked for once, and only when such a file is met: few processes map one.

    :param address: of the function
    :returns: "simple_dname" (fs/d_path.c), "anon_inodefs_dname" (fs/anon_inodes.c), "sockfs_dname"
        (net/socket.c), or None for any other, or if the symbols lack it
    """
    known: dict[int, str | None] = prog.cache.setdefault(_DNAMES_KEY, {})
    if address not in known:
        known[address] = next((name for name in _DNAMES if _address(prog, name) == address), None)
    return known[address]


def _special_mapping(prog: drgn.Program) -> SpecialMappingLayout | None:
    function = _address(prog, "special_mapping_name")
    if function is None:
        return None
    try:
        return SpecialMappingLayout(
            function,
            _struct(prog, "struct vm_area_struct", {"vm_private_data": ["vm_private_data"]}),
            _struct(prog, "struct vm_operations_struct", {"name": ["name"]}),
            _struct(prog, "struct vm_special_mapping", {"name": ["name"]}),
        )
    except KvirtError:
        return None


def _anon_name(prog: drgn.Program) -> int | None:
    try:
        # An array without a length, which has no size.
        return int(prog.type("struct anon_vma_name").member("name").offset)
    except LookupError:
        return None


def printk_layout(prog: drgn.Program) -> PrintkLayout | None:
    """Where the kernel's log is; None if types or symbols lack what that takes.

    :raises KvirtError: if this version of kvirt does not know such a log
    """
    prb = _address(prog, "prb")
    try:
        for name in ("printk_ringbuffer", "prb_desc", "printk_info"):
            prog.type(f"struct {name}")
    except LookupError:
        return None
    if prb is None:
        return None
    ring = {name: [f"desc_ring.{name}"] for name in ("count_bits", "descs", "infos")}
    ring |= {name: [f"desc_ring.{name}.counter"] for name in ("head_id", "tail_id")}
    ring |= {name: [f"text_data_ring.{name}"] for name in ("size_bits", "data")}
    info = {name: [name] for name in ("ts_nsec", "text_len", "facility", "caller_id")}
    return PrintkLayout(
        prb,
        _struct(prog, "struct printk_ringbuffer", ring),
        _struct(
            prog,
            "struct prb_desc",
            {
                "state_var": ["state_var.counter"],
                "begin": ["text_blk_lpos.begin"],
                "next": ["text_blk_lpos.next"],
            },
        ),
        _struct(prog, "struct printk_info", info),
    )


def _page_flag(prog: drgn.Program, name: str) -> int:
    """Mask of a page flag, 0 if this kernel has none of that name."""
    try:
        return 1 << int(prog.constant(name).value_())
    except LookupError:
        return 0


def _required_page_flag(prog: drgn.Program, name: str) -> int:
    mask = _page_flag(prog, name)
    if not mask:
        raise _unknown(f"This kernel has no page flag {name}")
    return mask


def _vmcoreinfo(prog: drgn.Program, name: str) -> int:
    """A number of VMCOREINFO, which decides what debug information does not have."""
    number = vmcoreinfo_number(prog, name)
    if number is not None:
        return number
    raise _unknown(f"This kernel's VMCOREINFO has no {name}, which tells what its page tables look like")


# arch/arm64/include/asm/pgtable-hwdef.h
_PTE_VALID, _PTE_SHARED, _PTE_NG = 1 << 0, 3 << 8, 1 << 11
# What entries without access rights have set above: PTE_PROT_NONE until 6.9, and none of them since.
_PTE_PROT_NONE, _PTE_UPPER = 1 << 58, 0x3F << 58
# include/linux/mm.h: VM_READ | VM_WRITE | VM_SHARED
_READ_WRITE_SHARED = 1 | 2 | 8


def arm64_marks(none: int, shared: int) -> tuple[bool, bool]:
    """Tell from two of the kernel's protections how it marks entries.

    :param none: ``PAGE_NONE``
    :param shared: ``PAGE_SHARED``
    :returns: whether ``PTE_PROT_NONE`` marks entries without access rights, or else
        ``PTE_PRESENT_INVALID`` in the place of nG; and whether ``lpa2_is_enabled()``, which leaves no room
        for shareability
    :raises KvirtError: if it is neither
    """
    upper = none & _PTE_UPPER
    if none & _PTE_VALID or not none & _PTE_NG or upper not in (0, _PTE_PROT_NONE) or not shared & _PTE_VALID:
        raise _unknown(
            f"The entries of this arm64 kernel's page tables are of an unknown kind (PAGE_NONE is {none:#x}, "
            f"PAGE_SHARED {shared:#x})"
        )
    return upper == _PTE_PROT_NONE, not shared & _PTE_SHARED


def _arm64(prog: drgn.Program) -> tuple[PageTables, int]:
    if drgn.sizeof(prog.type("pgd_t")) != 8:
        raise KvirtError(
            "This arm64 kernel has page tables of 128-bit entries (FEAT_D128), which this version of kvirt "
            "does not read."
        )
    protections = _address(prog, "protection_map")
    if protections is None:
        raise KvirtError(
            "This arm64 kernel has no protection_map, which tells what its page tables look like: "
            "kvirt reads arm64 from 6.0 on."
        )
    none, shared = (prog.read_u64(protections + 8 * i) for i in (0, _READ_WRITE_SHARED))
    prot_none, lpa2 = arm64_marks(none, shared)
    tables = arm64(
        int(prog["PAGE_SHIFT"].value_()),
        64 - _vmcoreinfo(prog, "TCR_EL1_T1SZ"),
        _vmcoreinfo(prog, "VA_BITS"),
        lpa2=lpa2,
        prot_none=prot_none,
    )
    return tables, _vmcoreinfo(prog, "MAX_PHYSMEM_BITS")


def _x86_64(prog: drgn.Program) -> tuple[PageTables, int]:
    # arch/x86/kernel/vmcore_info_64.c; a kernel that is built for four levels alone has no such variable.
    five = vmcoreinfo_number(prog, "pgtable_l5_enabled")
    if five is None:
        five = _number(prog, "__pgtable_l5_enabled", 4)
    levels = 5 if five else 4
    physical_mask = _number(prog, "physical_mask") or (1 << 52) - 1
    encrypted = vmcoreinfo_number(prog, "sme_mask") or _number(prog, "sme_me_mask") or 0
    tables = x86_64(levels, physical_mask & ~encrypted)
    # arch/x86/include/asm/sparsemem.h
    return tables, 52 if levels == 5 else 46


# How a kernel of an architecture tells what its page tables look like, and its MAX_PHYSMEM_BITS.
_PAGE_TABLES = {drgn.Architecture.X86_64: _x86_64, drgn.Architecture.AARCH64: _arm64}


def read_layout(prog: drgn.Program) -> Layout:
    """Learn this kernel's layout.

    :raises KvirtError: if kvirt does not know this kind of kernel, or witnesses contradict each other
    """
    arch = check_architecture(prog.platform)
    try:
        vma_type = prog.type("struct vm_area_struct")
    except LookupError:
        raise KvirtError(
            "The type information of this kernel does not have struct vm_area_struct: give its vmlinux "
            "with full debug information with --symbols."
        ) from None
    if vma_type.has_member("vm_region"):
        raise KvirtError(
            "This kernel has no MMU support, and page offsets mean something else there: "
            "kvirt does not read it."
        )
    # Where every walk begins.
    for name in ("init_mm", "init_pid_ns"):
        prog.variable(name)
    copy_vma = _copy_vma_parameters(prog)
    scheme = detect_scheme(_member_names(vma_type), copy_vma)
    page = _page(prog)
    zero_pfn = _number(prog, "zero_page_pfn")
    if zero_pfn is None:
        zero_pfn = _number(prog, "zero_pfn") if _variable(prog, "zero_pfn") is not None else None
    has_hwpoison = _has_function(prog, "memory_failure")
    tables, physmem_bits = _PAGE_TABLES[arch](prog)
    page_size = page.size
    has_mask = (
        prog.type("struct page").has_member("compound_info")
        and page_size & (page_size - 1) == 0
        and prog.type("struct zone").has_member("vmemmap_tails")
    )
    return Layout(
        release=prog["UTS_RELEASE"].string_().decode(),
        arch=arch.name.lower(),
        scheme=scheme,
        pgtable=tables,
        vmemmap=int(prog["vmemmap"].value_()),
        vma=_vma(prog, scheme),
        mm=_struct(
            prog,
            "struct mm_struct",
            {
                "ma_root": ["mm_mt.ma_root"],
                "map_count": ["map_count"],
                "mm_users": ["mm_users.counter"],
                "pgd": ["pgd"],
                "start_stack": ["start_stack"],
                "start_brk": ["start_brk"],
                "brk": ["brk"],
                "flags": ["flags"],
            },
            {
                # PREEMPT_RT's rw_semaphore has no such count: then it is not known who holds it.
                "mmap_lock_count": ["mmap_lock.count.counter"],
                # Counts the times that mmap_lock was held for write; with CONFIG_PER_VMA_LOCK.
                "mm_lock_seq": ["mm_lock_seq.sequence", "mm_lock_seq"],
            },
        ),
        avc=_struct(
            prog,
            "struct anon_vma_chain",
            {
                "vma": ["vma"],
                "anon_vma": ["anon_vma"],
                "same_vma_next": ["same_vma.next"],
                "same_vma_prev": ["same_vma.prev"],
            },
        ),
        anon_vma=_struct(
            prog,
            "struct anon_vma",
            {
                "root": ["root"],
                "parent": ["parent"],
                "refcount": ["refcount.refs.counter", "refcount.counter"],
                "rb_root": ["rb_root"],
            },
            {
                "num_children": ["num_children"],
                "num_active_vmas": ["num_active_vmas"],
                "rwsem_count": ["rwsem.count.counter"],
            },
        ),
        anon_tree=_tree(prog, "struct anon_vma_chain", "rb", "rb_subtree_last"),
        file_tree=_tree(prog, "struct vm_area_struct", "shared.rb", "shared.rb_subtree_last"),
        file=_struct(prog, "struct file", {"f_mapping": ["f_mapping"]}),
        mapping=_struct(
            prog,
            "struct address_space",
            {"host": ["host"], "i_mmap": ["i_mmap"]},
            {"rwsem_count": ["i_mmap_rwsem.count.counter"]},
        ),
        inode=_struct(prog, "struct inode", {"i_blkbits": ["i_blkbits"], "i_flags": ["i_flags"]}),
        page=page,
        large_counts=_large(prog),
        compound_mask=has_mask,
        maple=_maple(prog),
        vm=_vm_flags(prog),
        pg_hwpoison=_page_flag(prog, "PG_hwpoison"),
        pg_head=_required_page_flag(prog, "PG_head"),
        pg_locked=_page_flag(prog, "PG_locked"),
        pg_anon_exclusive=_page_flag(prog, "PG_anon_exclusive"),
        pg_double_map=_page_flag(prog, "PG_double_map"),
        zero_pfn=zero_pfn,
        zero_pages=((_number(prog, "zero_page_mask") or 0) >> tables.page_shift) + 1,
        huge_zero_pfn_address=_address(prog, "huge_zero_pfn"),
        swap_types=SwapTypes(swap_type_names(_max_swapfiles(prog, has_hwpoison), has_hwpoison)),
        swp_pfn_mask=(1 << (physmem_bits - tables.page_shift)) - 1,
        swap_cache=_swap_cache(prog),
        ksm=_ksm(prog),
        shmem_ops=frozenset(
            a for a in (_address(prog, n) for n in ("shmem_vm_ops", "shmem_anon_vm_ops")) if a is not None
        ),
        path=_path(prog),
        special_mapping=_special_mapping(prog),
        anon_name=_anon_name(prog),
        # Both came with the same change to copy_vma(), which was backported unevenly.
        dontunmap_resets_pgoff=copy_vma is None or "keep_source" in copy_vma,
        # Removed with the special units: "mm/filemap: remove hugetlb special casing" (6.7).
        hugetlb_index_in_pages=not _has_function(prog, "hugetlb_basepage_index"),
    )


_CACHE_KEY = "kvirt.layout"


def know_layout(prog: drgn.Program, layout: Layout) -> None:
    """Tell a program its kernel's layout, which another process has learned of the same kernel."""
    prog.cache[_CACHE_KEY] = layout


def layout_of(prog: drgn.Program) -> Layout:
    """The layout of a program's kernel, learned once.

    :raises KvirtError: as :func:`read_layout`
    """
    layout = prog.cache.get(_CACHE_KEY)
    if not isinstance(layout, Layout):
        try:
            layout = read_layout(prog)
        except drgn.FaultError as error:
            raise KvirtError(
                f"What kvirt needs to know of this kernel cannot be read ({error}): the dump is truncated or "
                "lacks kernel data; take it again, or with a lower makedumpfile dump level."
            ) from None
        except (LookupError, ValueError, OverflowError, AttributeError, TypeError) as error:
            raise KvirtError(
                f"The types and symbols of this kernel lack what kvirt needs ({error}), or are damaged: "
                "give its vmlinux with debug information with --symbols, or report the kernel's version."
            ) from None
        know_layout(prog, layout)
    return layout
