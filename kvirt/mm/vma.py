# SPDX-License-Identifier: GPL-2.0-only
"""struct vm_area_struct: read whole, and the kernel's own arithmetic on it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

import drgn
from drgn import container_of
from drgn.helpers.linux.mm import vma_name as _drgn_vma_name

from kvirt.layout import Layout, layout_of
from kvirt.snapshot import Readable

_ULONG_MAX = (1 << 64) - 1


class VmaKind(enum.StrEnum):
    """What a VMA maps."""

    ANON = "anon"
    SHMEM = "shmem"
    DEVZERO = "devzero"
    FILE_PRIVATE = "file-private"
    FILE_SHARED = "file-shared"
    HUGETLB = "hugetlb"
    STACK = "stack"
    SPECIAL = "special"


# What there are many of are tuples, which are made several times as fast as dataclasses.
class Vma(NamedTuple):
    """A ``struct vm_area_struct`` as it was in one read. Page offsets count base pages."""

    layout: Layout
    address: int
    vm_start: int
    vm_end: int
    vm_mm: int
    vm_flags: int
    vm_pgoff: int
    anon_pgoff: int
    """``vma_start_anon_pgoff()``; on a legacy kernel ``vm_pgoff``, which indexed folios there."""
    anon_vma: int
    vm_ops: int
    vm_file: int
    chain_next: int
    chain_prev: int
    anon_name: int

    def flag(self, name: str) -> bool:
        """Whether ``VM_<name>`` is set."""
        return bool(self.vm_flags & self.layout.vm[name])


_FIRST = ("vm_start", "vm_end", "vm_mm", "vm_flags", "vm_pgoff")
_LAST = ("anon_vma", "vm_ops", "vm_file", "chain_next", "chain_prev")


def vma_reader(memory: Readable, layout: Layout) -> Callable[[int], Vma]:
    """A function that reads the VMA at an address, with one read, so that as little as possible is torn.

    It raises :class:`drgn.FaultError` if the ``struct vm_area_struct`` cannot be read.
    """
    how = layout.vma
    halves = ("anon_pgoff_lo", "anon_pgoff_hi") if "anon_pgoff_lo" in how else ()
    name = ("anon_name",) if "anon_name" in how else ()
    get = how.getter((*halves, *_FIRST, *_LAST, *name))
    no_name = () if name else (0,)

    def read(address: int) -> Vma:
        values = get(memory.read(address, how.size))
        if halves:
            # include/linux/mm.h: vma_start_anon_pgoff()
            anon_pgoff = values[1] << 32 | values[0]
            return Vma._make((layout, address, *values[2:7], anon_pgoff, *values[7:], *no_name))
        return Vma._make((layout, address, *values[:5], values[4], *values[5:], *no_name))

    return read


def vma_snapshot(vma: drgn.Object) -> Vma:
    """The :class:`Vma` of a drgn object.

    :param vma: ``struct vm_area_struct *``
    """
    return vma_reader(vma.prog_, layout_of(vma.prog_))(vma.value_())


def vma_pages(vma: Vma) -> int:
    """Pages that a VMA spans (include/linux/mm.h)."""
    # As unsigned as the kernel's: a damaged VMA may end before it starts.
    return ((vma.vm_end - vma.vm_start) & _ULONG_MAX) >> vma.layout.page_shift


def vma_start_pgoff(vma: Vma) -> int:
    """Offset of the first page in the file (include/linux/mm.h)."""
    return vma.vm_pgoff


def vma_start_anon_pgoff(vma: Vma) -> int:
    """Offset by which anonymous folios of the first page are indexed (include/linux/mm.h)."""
    return vma.anon_pgoff


def vma_last_pgoff(vma: Vma) -> int:
    """Offset of the last page in the file (include/linux/mm.h)."""
    return (vma.vm_pgoff + vma_pages(vma) - 1) & _ULONG_MAX


def vma_last_anon_pgoff(vma: Vma) -> int:
    """Offset by which anonymous folios of the last page are indexed (include/linux/mm.h)."""
    return (vma.anon_pgoff + vma_pages(vma) - 1) & _ULONG_MAX


def linear_page_index(vma: Vma, address: int) -> int:
    """Index in the file of the page at an address (include/linux/pagemap.h)."""
    return vma.vm_pgoff + ((address - vma.vm_start) >> vma.layout.page_shift)


def linear_anon_page_index(vma: Vma, address: int) -> int:
    """Index that an anonymous page at an address has (include/linux/pagemap.h).

    On a legacy kernel this is :func:`linear_page_index`.
    """
    return vma.anon_pgoff + ((address - vma.vm_start) >> vma.layout.page_shift)


def vma_is_anonymous(vma: Vma) -> bool:
    """Whether the VMA has no operations of its own; true for private /dev/zero (include/linux/mm.h)."""
    return vma.vm_ops == 0


def vma_is_pure_anon(vma: Vma) -> bool:
    """Anonymous, and without a file too."""
    return vma.vm_ops == 0 and vma.vm_file == 0


def vma_is_cow_mapping(vma: Vma) -> bool:
    """Whether a write may make an anonymous copy (``is_cow_mapping()``, include/linux/mm.h)."""
    shared, maywrite = vma.layout.vm["SHARED"], vma.layout.vm["MAYWRITE"]
    return vma.vm_flags & (shared | maywrite) == maywrite


def vma_is_temporary_stack(vma: Vma) -> bool:
    """Whether an exec still builds its stack here (include/linux/mm.h)."""
    incomplete = vma.layout.vm["RAND_READ"] | vma.layout.vm["SEQ_READ"]
    return vma.flag("GROWSDOWN") and vma.vm_flags & incomplete == incomplete


def displacement(vma: Vma) -> int:
    """Pages by which the anonymous offset differs from the address; 0 is "in place"."""
    return vma.anon_pgoff - (vma.vm_start >> vma.layout.page_shift)


def permissions(vma: Vma) -> str:
    """The permissions as in ``/proc/PID/maps`` ("rw-p")."""
    letters = [c if vma.flag(n) else "-" for c, n in (("r", "READ"), ("w", "WRITE"), ("x", "EXEC"))]
    return "".join(letters) + ("s" if vma.flag("MAYSHARE") else "p")


def vma_kind(vma: Vma, start_stack: int = 0) -> VmaKind:
    """Sort a VMA into the kinds of "anonymous", and the rest.

    :param start_stack: ``mm->start_stack``, 0 if not known
    """
    # The order matters: a hugetlb mapping has a file, a stack has none.
    if vma.flag("HUGETLB"):
        return VmaKind.HUGETLB
    if vma_is_pure_anon(vma):
        if vma.flag("GROWSDOWN") or vma.vm_start <= start_stack < vma.vm_end:
            return VmaKind.STACK
        return VmaKind.ANON
    if vma.flag("PFNMAP") or vma.flag("IO") or vma.vm_file == 0:
        return VmaKind.SPECIAL
    if vma_is_anonymous(vma):
        return VmaKind.DEVZERO
    if not vma.flag("MAYSHARE"):
        return VmaKind.FILE_PRIVATE
    return VmaKind.SHMEM if vma.vm_ops in vma.layout.shmem_ops else VmaKind.FILE_SHARED


# Directories deep, mounts included. PATH_MAX allows fewer.
_PATH_DEPTH_MAX = 4096


def d_path(path: drgn.Object) -> bytes:
    """Name of a file as ``/proc/PID/maps`` shows it (fs/d_path.c: d_path()), in a bounded walk.

    drgn's function of that name follows damaged or torn parents for ever.

    :param path: ``struct path``
    :raises ValueError: if the parents do not lead to a root
    """
    dentry = path.dentry.read_()
    mount = container_of(path.mnt, "struct mount", "mnt")
    root = dentry == mount.mnt.mnt_root
    if dentry.d_op and dentry.d_op.d_dname and not (dentry == dentry.d_parent and root):
        # memfds, shared memory and the like: simple_dname()
        return b"/" + bytes(dentry.d_name.name.string_()) + b" (deleted)"
    # d_unlinked(), include/linux/dcache.h
    suffix = b" (deleted)" if not dentry.d_hash.pprev and dentry != dentry.d_parent else b""
    names: list[bytes] = []
    for _ in range(_PATH_DEPTH_MAX):
        if dentry == mount.mnt.mnt_root or dentry == dentry.d_parent:
            if mount == mount.mnt_parent or dentry != mount.mnt.mnt_root:
                return b"/" + b"/".join(reversed(names)) + suffix
            dentry, mount = mount.mnt_mountpoint.read_(), mount.mnt_parent.read_()
        else:
            names.append(bytes(dentry.d_name.name.string_()))
            dentry = dentry.d_parent.read_()
    raise ValueError("a path without a root")


class VmaNames:
    """Names of VMAs as ``/proc/PID/maps`` shows them; a file's path is found once."""

    def __init__(self, prog: drgn.Program, start_stack: int, start_brk: int, brk: int) -> None:
        self._prog = prog
        self._start_stack = start_stack
        self._heap = (start_brk, brk)
        self._files: dict[int, str] = {}

    def _file(self, address: int) -> str:
        if address not in self._files:
            try:
                path = drgn.Object(self._prog, "struct file *", address).f_path.read_()
                self._files[address] = d_path(path).decode(errors="backslashreplace")
            except (drgn.FaultError, LookupError, ValueError, AttributeError):
                # A path is a courtesy: a torn or damaged dentry must not stop the check.
                self._files[address] = "?"
        return self._files[address]

    def _anon_name(self, vma: Vma, prefix: str) -> str:
        if not vma.anon_name:
            return ""
        anon = drgn.Object(self._prog, "struct anon_vma_name *", vma.anon_name)
        return f"[{prefix}:{anon.name.string_().decode(errors='backslashreplace')}]"

    def __call__(self, vma: Vma) -> str:
        """Name of a VMA, "" if it has none (fs/proc/task_mmu.c: get_vma_name())."""
        name = ""
        try:
            if vma.vm_file:
                name = self._anon_name(vma, "anon_shmem") or self._file(vma.vm_file)
            elif vma.vm_ops:
                obj = drgn.Object(self._prog, "struct vm_area_struct *", vma.address)
                name = _drgn_vma_name(obj).decode(errors="backslashreplace")
            elif vma.vm_start < self._heap[1] and vma.vm_end > self._heap[0]:
                name = "[heap]"
            elif vma.vm_start <= self._start_stack <= vma.vm_end:
                name = "[stack]"
            else:
                name = self._anon_name(vma, "anon")
        except (drgn.FaultError, LookupError, ValueError, AttributeError):
            name = "?"
        return name
