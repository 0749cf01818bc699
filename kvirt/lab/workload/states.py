# SPDX-License-Identifier: GPL-2.0-only
"""The states of one process's address space, one small function each.

A function gets the process to build in and returns the regions it vouches for, by name. The first
line of its docstring becomes their note. To add a state, add a function with ``@state``.
"""

from __future__ import annotations

import errno
import inspect
import os
import resource
from collections.abc import Callable
from pathlib import Path

from kvirt.lab.procfs import PAGE_SHIFT, PAGE_SIZE, read_maps, smaps_field
from kvirt.lab.workload import syscalls as sc
from kvirt.lab.workload.process import NotReached, Process, Skip
from kvirt.lab.workload.regions import Region, join

Regions = dict[str, Region]
Build = Callable[[Process], Regions]

# Name -> (function, note). STATES are built always, those in OPTIONAL by --with NAME.
STATES: dict[str, tuple[Build, str]] = {}
OPTIONAL: dict[str, tuple[Build, str]] = {}

THP = Path("/sys/kernel/mm/transparent_hugepage")


def _first_line(function: object) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def state(name: str) -> Callable[[Build], Build]:
    """Register a function under a name."""

    def register(build: Build) -> Build:
        STATES[name] = (build, _first_line(build))
        return build

    return register


def optional(name: str) -> Callable[[Build], Build]:
    """Register a function that changes settings of the whole machine."""

    def register(build: Build) -> Build:
        OPTIONAL[name] = (build, _first_line(build))
        return build

    return register


# Where splits and merges begin: 8 pages, half of them written, without and with a file.


def _anon(p: Process) -> Region:
    return p.write(p.anon(8), range(0, 8, 2))


def _moved_anon(p: Process) -> Region:
    return p.remap(_anon(p))


def _file(p: Process) -> Region:
    region = p.file(p.memfd(16), 8, 5)
    return p.read(p.write(region, range(0, 8, 2)), range(1, 8, 2))


def _moved_file(p: Process) -> Region:
    return p.remap(_file(p))


def _unfaulted_file(p: Process) -> Region:
    return p.read(p.file(p.memfd(16), 8, 5), range(1, 8, 2))


BASES: dict[str, Callable[[Process], Region]] = {
    "anon": _anon,
    "moved-anon": _moved_anon,
    "file": _file,
    "moved-file": _moved_file,
    "unfaulted-file": _unfaulted_file,
}


def state_on_bases(
    name: str,
) -> Callable[[Callable[[Process, Region], Regions]], Callable[[Process, Region], Regions]]:
    """Register a function once for each of BASES."""

    def register(
        build: Callable[[Process, Region], Regions],
    ) -> Callable[[Process, Region], Regions]:
        note = _first_line(build)
        for base, make in BASES.items():

            def on_base(p: Process, make: Callable[[Process], Region] = make) -> Regions:
                return build(p, make(p))

            STATES[f"{name}-{base}"] = (on_base, note)
        return build

    return register


# Files


@state("cow-file")
def cow_file(p: Process) -> Regions:
    """Private file mapping at page 4 of its file, every second page written, the others read."""
    region = p.file(p.memfd(32), 16, 4)
    return {"region": p.read(p.write(region, range(0, 16, 2)), range(1, 16, 2))}


@state("read-file")
def read_file(p: Process) -> Regions:
    """Private file mapping that is only read."""
    return {"region": p.read(p.file(p.memfd(16), 8, 2, prot="r"), range(0, 8, 3))}


@state("untouched-file")
def untouched_file(p: Process) -> Regions:
    """Private file mapping nobody has touched."""
    return {"region": p.file(p.memfd(16), 8, 3)}


@state("disk-file")
def disk_file(p: Process) -> Regions:
    """The interpreter's file mapped again: private from page 1, and shared for reading only."""
    fd = os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)
    return {
        "private": p.file(fd, 4, 1, prot="rx"),
        "shared": p.file(fd, 4, 2, prot="r", kind="file-shared"),
    }


@state("forced-write")
def forced_write(p: Process) -> Regions:
    """A read-only private file mapping, in place and displaced, that a debugger wrote to."""

    def region() -> Region:
        return p.write_by_debugger(p.read(p.file(p.memfd(8), 4, 3, prot="r"), range(4)), 2)

    return {"region": region(), "moved": p.write_by_debugger(p.remap(region()), 0)}


@state("shared")
def shared(p: Process) -> Regions:
    """Shared memory: a memfd from its page 2, and anonymous; written."""
    return {
        "memfd": p.write(p.file(p.memfd(16), 8, 2, kind="shmem")),
        "anon": p.write(p.shared_anon(4)),
    }


@state("moved-shared")
def moved_shared(p: Process) -> Regions:
    """Shared memory moved by mremap: never faulted, so the anon pgoff follows."""
    return {
        "memfd": p.remap(p.write(p.file(p.memfd(16), 8, 2, kind="shmem"))),
        "anon": p.remap(p.write(p.shared_anon(4))),
    }


# mremap


@state("moved-unfaulted")
def moved_unfaulted(p: Process) -> Regions:
    """Unfaulted private memory moved by mremap: the anon pgoff follows."""
    return {
        "anon": p.remap(p.anon(4)),
        "file": p.remap(p.file(p.memfd(16), 4, 7)),
        "read-file": p.remap(_unfaulted_file(p)),
        "devzero": p.remap(p.file(_devzero(), 4, 3, kind="devzero")),
    }


@state("moved-faulted")
def moved_faulted(p: Process) -> Regions:
    """Faulted private memory moved by mremap: displaced."""
    return {"anon": _moved_anon(p), "file": _moved_file(p)}


@state("moved-part")
def moved_part(p: Process) -> Regions:
    """The middle of faulted memory moved by mremap: three VMAs, the middle one displaced."""
    result: Regions = {}
    for name, region in (("anon", _anon(p)), ("file", _file(p))):
        low, middle, high = region.split(2, 5)
        result |= {f"{name}-low": low, f"{name}-moved": p.remap(middle), f"{name}-high": high}
    return result


@state("homecoming")
def homecoming(p: Process) -> Regions:
    """Faulted, moved away and back again: in place as if nothing had been."""
    result = {}
    for name, region in (("anon", _anon(p)), ("file", _file(p))):
        home = region.start
        away = p.remap(region)
        result[name] = p.remap(p.write(away, [1]), home)
    return result


@state("moved-twice")
def moved_twice(p: Process) -> Regions:
    """Moved unfaulted, then written, then moved again: displaced by the second move alone."""
    return {
        "anon": p.remap(p.write(p.remap(p.anon(4)), [0, 3])),
        "file": p.remap(p.write(p.remap(p.file(p.memfd(8), 4, 2)), [0, 3])),
    }


@state("self-alias")
def self_alias(p: Process) -> Regions:
    """Moved by less than its size: its page indexes name addresses of its own."""
    at = p.slot(24)
    region = p.write(p.file(p.memfd(16), 8, 1, at=at), range(8))
    away = p.remap(region)
    return {"region": p.remap(away, at + 3 * PAGE_SIZE)}


@state("resized")
def resized(p: Process) -> Regions:
    """Displaced memory that mremap grew and shrank, in place and while it moved."""
    grown = p.remap(_anon(p), p.slot(12))
    shrunk = _moved_file(p)
    return {
        "grown": p.write(p.resize(grown, 12), [11]),
        "shrunk": p.resize(shrunk, 5),
        "grown-by-move": p.write(p.remap(_file(p), pages=11), [10]),
        "shrunk-by-move": p.remap(_anon(p), pages=5),
    }


@state("multi-vma-move")
def multi_vma_move(p: Process) -> Regions:
    """Several VMAs moved by one mremap: each by the rule for itself."""
    low, middle, high = p.protect(_file(p), 3, 2, "r")
    size = high.end - low.start
    target = p.slot(size // PAGE_SIZE)
    try:
        sc.mremap(low.start, size, size, sc.MREMAP_MAYMOVE | sc.MREMAP_FIXED, target)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        raise Skip("This kernel moves only one VMA with one mremap; several need Linux 6.17.") from error
    p.fence(low.start, high.end)
    moved = [part.moved(part.start - low.start + target) for part in (low, middle, high)]
    return dict(zip(("low", "middle", "high"), moved, strict=True))


# Splits


@state_on_bases("split-mprotect-middle")
def split_mprotect_middle(p: Process, region: Region) -> Regions:
    """Mprotect of the middle: split below it (new_below), then above."""
    low, middle, high = p.protect(region, 3, 3, "r")
    return {"low": low, "middle": middle, "high": high}


@state_on_bases("split-mprotect-ends")
def split_mprotect_ends(p: Process, region: Region) -> Regions:
    """Mprotect of the first pages (new VMA above), then of the last (new VMA below)."""
    low, rest = p.protect(region, 0, 2, "r")
    middle, high = p.protect(rest, 3, 3, "r")
    return {"low": low, "middle": middle, "high": high}


@state_on_bases("split-munmap")
def split_munmap(p: Process, region: Region) -> Regions:
    """Munmap of the middle, then of the first and of the last page."""
    low, high = p.unmap(region, 3, 2)
    (low,) = p.unmap(low, 0, 1)
    (high,) = p.unmap(high, 2, 1)
    return {"low": low, "high": high}


@state_on_bases("split-dontdump")
def split_dontdump(p: Process, region: Region) -> Regions:
    """MADV_DONTDUMP on the first pages and on the last."""
    low, rest = p.advise(region, 0, 3, sc.MADV_DONTDUMP)
    middle, high = p.advise(rest, 3, 2, sc.MADV_DONTDUMP)
    return {"low": low, "middle": middle, "high": high}


# Merges


@state_on_bases("merge-both")
def merge_both(p: Process, region: Region) -> Regions:
    """Split by mprotect, and merged again with both neighbours."""
    low, middle, high = p.protect(region, 3, 3, "r")
    (middle,) = p.protect(middle, 0, 3, "rw")
    return {"region": join(low, middle, high)}


@state_on_bases("merge-left")
def merge_left(p: Process, region: Region) -> Regions:
    """The lower part of a read-only upper half made writable: the VMA below grows over it."""
    low, high = p.protect(region, 4, 4, "r")
    part, high = p.protect(high, 0, 2, "rw")
    return {"low": join(low, part), "high": high}


@state_on_bases("merge-right")
def merge_right(p: Process, region: Region) -> Regions:
    """The upper part of a read-only lower half made writable: the VMA above grows down over it."""
    low, high = p.protect(region, 0, 4, "r")
    low, part = p.protect(low, 2, 2, "rw")
    return {"low": low, "high": join(part, high)}


@state("merge-unfaulted")
def merge_unfaulted(p: Process) -> Regions:
    """An unfaulted and a faulted VMA side by side, made equal by mprotect: one faulted VMA."""
    result = {}
    for name in ("anon", "file"):
        for faulted in ("low", "high"):
            at = p.slot(8)
            fd = p.memfd(16)
            # The protections differ when they are mapped, or they would be one VMA already.
            low_prot, high_prot = ("rw", "r") if faulted == "low" else ("r", "rw")
            if name == "anon":
                low = p.anon(4, at, low_prot)
                high = p.anon(4, low.end, high_prot)
            else:
                low = p.file(fd, 4, 6, at, low_prot)
                high = p.file(fd, 4, 10, low.end, high_prot)
            p.write(low if faulted == "low" else high, [1, 2])
            changed = high if faulted == "low" else low
            p.protect(changed, 0, 4, "rw")
            changed.prot = "rw"
            result[f"{name}-{faulted}-faulted"] = join(low, high)
    return result


@state("merge-moved")
def merge_moved(p: Process) -> Regions:
    """Unfaulted anonymous memory moved next to faulted memory, below and above: merged."""
    middle = p.write(p.anon(4, p.slot(12) + 4 * PAGE_SIZE), [0, 2])
    low, high = p.anon(4), p.anon(4)
    low = p.remap(low, middle.start - 4 * PAGE_SIZE)
    high = p.remap(high, middle.end)
    return {"region": join(low, middle, high)}


@state("self-merge")
def self_merge(p: Process) -> Regions:
    """Unfaulted anonymous memory moved by exactly its size: copy_vma merges it with itself."""
    up, down = p.slot(8), p.slot(8)
    return {
        "up": p.remap(p.anon(4, up), up + 4 * PAGE_SIZE),
        "down": p.remap(p.anon(4, down + 4 * PAGE_SIZE), down),
    }


@state("blocked-merge")
def blocked_merge(p: Process) -> Regions:
    """Adjacent in the file but not in anon pgoff: only a kernel without anon pgoffs merges them."""
    if p.scheme is None:
        raise Skip(
            "Without readable BTF in /sys/kernel/btf/vmlinux it is not known whether this kernel"
            " has an anon pgoff, hence whether it merges these regions."
        )
    fd = p.memfd(10)
    low = p.file(fd, 5, 0, p.slot(10))
    high = p.remap(p.write(p.file(fd, 5, 5), [0, 3]), low.end)
    # Linux 6.12 does not yet merge a faulted VMA into an unfaulted one, 6.18 does: what came of it
    # has to be looked up. With an anon pgoff it is certain, and the check against /proc decides.
    if p.scheme == "anon" or any(mapping.start == high.start for mapping in read_maps()):
        return {"low": low, "high": high}
    # The rule of join() is that of 7.3; this kernel has no anon pgoff to compare.
    high.anon_pgoff = low.end >> PAGE_SHIFT
    return {"merged": join(low, high)}


@state("blocked-reuse")
def blocked_reuse(p: Process) -> Regions:
    """As blocked-merge, but of two protections: two anon_vmas where legacy kernels share one."""
    fd = p.memfd(10)
    low = p.file(fd, 5, 0, p.slot(10))
    (high,) = p.protect(p.write(p.file(fd, 5, 5), [0, 3]), 0, 5, "r")
    high = p.remap(high, low.end)
    return {"low": p.write(low, [1]), "high": high}


# /dev/zero


def _devzero() -> int:
    return os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)


@state("devzero")
def devzero(p: Process) -> Regions:
    """Private /dev/zero, anonymous memory with a file: in place, displaced, MREMAP_DONTUNMAP."""

    def written() -> Region:
        return p.write(p.file(_devzero(), 6, 2, kind="devzero"), [0, 2, 3])

    source, copy = p.dontunmap(written())
    moved_source, moved_copy = p.dontunmap(p.remap(written()))
    return {
        "in-place": written(),
        "read": p.read(p.file(_devzero(), 4, 0, kind="devzero"), [1]),
        "moved": p.remap(written()),
        "dontunmap-source": source,
        "dontunmap-copy": copy,
        "moved-dontunmap-source": moved_source,
        "moved-dontunmap-copy": moved_copy,
    }


# MREMAP_DONTUNMAP


@state_on_bases("dontunmap-whole")
def dontunmap_whole(p: Process, region: Region) -> Regions:
    """MREMAP_DONTUNMAP of a whole VMA: the source is unfaulted and in place again."""
    source, copy = p.dontunmap(region)
    return {"source": source, "copy": copy}


@state_on_bases("dontunmap-part")
def dontunmap_part(p: Process, region: Region) -> Regions:
    """MREMAP_DONTUNMAP of a part: the source stays as it was, without those pages."""
    source, copy = p.dontunmap(region, 2, 4)
    return {"source": source, "copy": copy}


@state("dontunmap-rewritten")
def dontunmap_rewritten(p: Process) -> Regions:
    """The source of MREMAP_DONTUNMAP of displaced memory, written again."""
    source, copy = p.dontunmap(_moved_file(p))
    return {"source": p.write(source, [1, 4]), "copy": copy}


# Pages


@state("zero-page")
def zero_page(p: Process) -> Regions:
    """Anonymous memory that was only read: the zero page, no anon_vma."""
    return {"region": p.read(p.anon(4), [0, 2])}


@state("prot-none")
def prot_none(p: Process) -> Regions:
    """Written memory made PROT_NONE, in place and displaced: the pages stay."""
    result = {}
    for name, region in (("anon", _anon(p)), ("moved-file", _moved_file(p))):
        (result[name],) = p.protect(region, 0, region.pages, "")
    return result


@state("guard")
def guard(p: Process) -> Regions:
    """Guard markers in untouched and in displaced memory; they make anonymous memory faulted."""
    result = {}
    untouched = p.anon(4)
    for name, region in (("untouched", untouched), ("moved-anon", _moved_anon(p))):
        try:
            sc.madvise(region.address(1), 2 * PAGE_SIZE, sc.MADV_GUARD_INSTALL)
        except OSError as error:
            raise Skip("This kernel has no MADV_GUARD_INSTALL, which came in Linux 6.13.") from error
        region.written -= {region.address(1), region.address(2)}
        region.faulted = True
        result[name] = region
    return result


@state("uffd-move")
def uffd_move(p: Process) -> Regions:
    """UFFDIO_MOVE into displaced memory and /dev/zero: pages get the indexes of their new place."""
    targets = {
        "moved-anon": p.remap(p.write(p.anon(8), [0])),
        "devzero": p.file(_devzero(), 8, 1, kind="devzero"),
    }
    result: Regions = {}
    try:
        uffd = sc.Userfaultfd(sc.UFFD_FEATURE_MOVE)
    except OSError as error:
        raise Skip(
            f"This kernel offers no UFFDIO_MOVE here ({error.strerror}); it came in Linux 6.8."
        ) from error
    with uffd:
        for name, target in targets.items():
            source = p.write(p.anon(8), range(8))
            uffd.register(target.start, target.size)
            uffd.move(target.address(2), source.address(4), 3 * PAGE_SIZE)
            source.written -= {source.address(page) for page in (4, 5, 6)}
            target.written |= {target.address(page) for page in (2, 3, 4)}
            target.faulted = True
            result |= {f"{name}-target": target, f"{name}-source": source}
    return result


# Transparent huge pages


def _huge(p: Process, huge_pages: int = 2) -> tuple[Region, int]:
    """Return written memory of that many huge pages, and the pages in a huge page."""
    try:
        size = int((THP / "hpage_pmd_size").read_text())
        enabled = (THP / "enabled").read_text()
    except OSError as error:
        raise Skip("This kernel has no transparent huge pages.") from error
    if "[never]" in enabled:
        raise Skip(
            f"Transparent huge pages are off ({THP}/enabled says never, as the kernel decides by"
            " itself in a machine of less than 512 MiB)."
        )
    region = p.anon(huge_pages * size // PAGE_SIZE, align=size)
    sc.madvise(region.start, region.size, sc.MADV_HUGEPAGE)
    p.write(region)
    got = smaps_field(p.pid, region.start, "AnonHugePages") or 0
    if not got:
        raise Skip("The kernel had no huge page to give when the memory was written.")
    region.note = f"When it was written {got} kB of it were huge pages mapped by a PMD."
    return region, size // PAGE_SIZE


@state("thp")
def thp(p: Process) -> Regions:
    """Transparent huge pages in place."""
    return {"region": _huge(p)[0]}


@state("thp-moved")
def thp_moved(p: Process) -> Regions:
    """Transparent huge pages moved by whole huge pages: mapped by a PMD, displaced."""
    region, pages = _huge(p)
    return {"region": p.remap(region, p.slot(region.pages, pages * PAGE_SIZE))}


@state("thp-moved-page")
def thp_moved_page(p: Process) -> Regions:
    """Transparent huge pages moved to a page after a boundary: PTE-mapped, index not aligned."""
    region, pages = _huge(p)
    target = p.slot(region.pages + pages, pages * PAGE_SIZE)
    return {"region": p.remap(region, target + PAGE_SIZE)}


@state("thp-halved")
def thp_halved(p: Process) -> Regions:
    """A huge page half unmapped, in place and displaced."""
    region, pages = _huge(p, 1)
    (low,) = p.unmap(region, pages // 2, pages // 2)
    region, pages = _huge(p, 1)
    region = p.remap(region, p.slot(region.pages, pages * PAGE_SIZE))
    (high,) = p.unmap(region, 0, pages // 2 + 1)
    return {"low": low, "moved-high": high}


@state("thp-protected")
def thp_protected(p: Process) -> Regions:
    """The middle of displaced huge pages made read-only: three VMAs on two huge pages."""
    region, pages = _huge(p)
    region = p.remap(region, p.slot(region.pages, pages * PAGE_SIZE))
    low, middle, high = p.protect(region, pages // 2 + 3, pages, "r")
    return {"low": low, "middle": middle, "high": high}


# The process's own


@state("stack")
def stack(p: Process) -> Regions:
    """The stack, moved by exec and grown downwards: displaced in every process."""
    mapping = next((m for m in read_maps() if m.path == "[stack]"), None)
    if mapping is None:
        raise Skip("This process has no mapping called [stack].")
    # Far enough below that the interpreter does not come here by itself.
    start = mapping.start - (1 << 20)
    limit = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if limit != resource.RLIM_INFINITY and mapping.end - start > limit:
        raise Skip(f"The stack may not grow by 1 MiB: its limit is {limit} bytes (ulimit -s).")
    sc.store(start, 1, 0x6B)
    # Exec builds it at the top of the address space; the offsets of its end stay those of that.
    top = _stack_top_max()
    pgoff = None if top is None else (top - (mapping.end - start)) >> PAGE_SHIFT
    region = Region(
        "stack",
        start,
        mapping.end - start,
        vm_pgoff=pgoff,
        anon_pgoff=pgoff,
        legacy_vm_pgoff=pgoff,
    )
    region.prot = mapping.perms[:3].replace("-", "")
    region.faulted = True
    region.written.add(start)
    return {"region": region}


def _stack_top_max() -> int | None:
    """Return the kernel's STACK_TOP_MAX: the end of the address space, less one page on x86-64."""
    if os.uname().machine != "x86_64":
        return None
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line[:5] == "flags"), "")
    bits = 56 if "la57" in flags.split() else 47
    return (1 << bits) - PAGE_SIZE


@state("special")
def special(p: Process) -> Regions:
    """The mappings of the vDSO: no file, both offsets their own (0 and the address)."""
    result = {}
    for mapping in read_maps():
        if mapping.path in ("[vdso]", "[vvar]", "[vvar_vclock]"):
            size = mapping.end - mapping.start
            prot = mapping.perms[:3].replace("-", "")
            result[mapping.path[1:-1]] = Region.mapped("special", mapping.start, size, 0, prot)
    if not result:
        raise Skip("This process has no vDSO.")
    return result


# What changes settings of the whole machine


@optional("hugetlb")
def hugetlb(p: Process) -> Regions:
    """Private hugetlb pages, in place and displaced."""
    size = _hugetlb_size()
    pages = 2 * size // PAGE_SIZE

    def mapped() -> Region:
        region = Region.mapped("hugetlb", p.slot(pages, size), 2 * size, 0)
        flags = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_HUGETLB | sc.MAP_FIXED
        sc.mmap(region.start, region.size, 3, flags)
        return p.write(region)

    try:
        return {
            "in-place": mapped(),
            "moved": p.remap(mapped(), p.slot(pages, size)),
        }
    except OSError as error:
        raise Skip(f"The kernel gave no hugetlb pages: {error.strerror}.") from error


def _hugetlb_size() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) << 10
    raise Skip("This kernel has no hugetlb pages.")


@optional("ksm")
def ksm(p: Process) -> Regions:
    """Equal pages that KSM has merged, anonymous and of a private file."""
    regions = {name: make(p) for name, make in BASES.items() if name != "unfaulted-file"}
    for region in regions.values():
        sc.madvise(region.start, region.size, sc.MADV_MERGEABLE)
    return regions


@optional("swap")
def swap(p: Process) -> Regions:
    """Pages in swap: there alone, in the swap cache too, moved since, and brought back."""
    result: Regions = {}
    for name, make in (
        ("anon", _anon),
        ("moved-anon", _moved_anon),
        ("file", _file),
        ("moved-file", _moved_file),
        ("devzero", lambda p: p.write(p.file(_devzero(), 6, 2, kind="devzero"), [0, 2, 3])),
    ):
        result[name] = p.page_out(make(p))
        result[f"{name}-cached"] = p.page_out(make(p), hold=True)
        result[f"{name}-back"] = p.bring_back(p.page_out(make(p)), [0, 2])
        result[f"{name}-cached-back"] = p.bring_back(p.page_out(make(p), hold=True), [0, 2])
        result[f"{name}-then-moved"] = p.remap(p.page_out(make(p)))
        result[f"{name}-cached-then-moved"] = p.remap(p.page_out(make(p), hold=True))
    try:
        region, pages = _huge(p, 1)
        result["huge"] = p.page_out(p.remap(region, p.slot(pages, pages * PAGE_SIZE)))
    except Skip as reason:
        p.skipped.append(("swap-huge", str(reason)))
    return result


def build(p: Process, table: dict[str, tuple[Build, str]]) -> None:
    """Build the states of a table in a process."""
    for name, (make, note) in table.items():
        try:
            regions = make(p)
        except Skip as reason:
            p.skipped.append((name, str(reason)))
            continue
        except (OSError, ValueError) as error:
            raise NotReached(f"The state {name} could not be built: {error}.") from error
        for key, region in regions.items():
            region.note = f"{note} {region.note}".strip()
            p.regions[f"{name}/{key}"] = region
