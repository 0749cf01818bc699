# SPDX-License-Identifier: GPL-2.0-only
"""Bulk reads of physical memory, straight from the file where the target is an ELF core.

drgn reads a core by a system call for each page, and hands out copies. Here the file is mapped, and what is
wanted is gathered from it in one go. This module alone decides what is read so; everything else, cores of
other formats and running kernels among it, is read through drgn.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import drgn
import numpy as np
import numpy.typing as npt

from kvirt.elfcore import PT_LOAD, ProgramHeader, read_elf_core
from kvirt.errors import KvirtError
from kvirt.snapshot import PAGE_BYTES

U64 = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
Things = npt.NDArray[np.void]
T = TypeVar("T")
# Where the first is, and the part of an array that it and those behind it are for.
_Piece = tuple[int, int, int]


class Runs(NamedTuple):
    """Numbers, of page frames or places, of which many follow one another."""

    first: Places
    """The first of each run of neighbours."""
    lengths: Places

    @property
    def total(self) -> int:
        """How many numbers these are."""
        return int(self.lengths.sum())

    def each(self) -> Places:
        """One number after the other."""
        if len(self.first) == self.total:
            return self.first
        return neighbours(self.first, self.lengths)


def runs_of(numbers: Places, scattered: int) -> Runs | None:
    """Numbers in any order, as runs of those that follow one another.

    :param numbers: at least one
    :returns: None if there are several runs, and more than one of so many numbers is the first of one
    """
    breaks = numbers[1:] - numbers[:-1] != 1
    several = int(np.count_nonzero(breaks))
    if several and (several + 1) * scattered > len(numbers):
        return None
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    return Runs(numbers[starts], np.diff(starts, append=len(numbers)))


_CACHE_KEY = "kvirt.core"
# What is looked at has so much of the file mapped around it (fault_around_bytes, mm/memory.c), and counts as
# this process's memory until it is given back.
_WINDOW = 64 << 10
_ARRAY_BYTES_MAX = 24 << 20
# Things side by side in the file that are worth a copy of their own.
RUN = 64
_WINDOWS_MAX = (256 << 20) // _WINDOW


# glibc takes arrays of more than 128 KiB from the kernel one by one, each page of which is faulted in and
# cleared, until one that is larger than they has been freed (mallopt(3), M_MMAP_THRESHOLD).
np.empty(_ARRAY_BYTES_MAX, dtype=np.uint8)

_libc = ctypes.CDLL(None)
_libc.signal.restype, _libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value


class _BusErrors:
    """What happens when mapped memory has no file behind it any more, or its disk fails.

    The kernel sends SIGBUS in the middle of an instruction, and again and again until that succeeds: Python's
    own handlers would never run. This one maps zeros in place of the file, and leaves a note of it.
    """

    def __init__(self) -> None:
        self._mapped: tuple[int, int] | None = None
        self._failed = False
        # Kept, for what C calls must not be collected.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._handle)
        self._before = _libc.signal(signal.SIGBUS, ctypes.cast(self._handler, ctypes.c_void_p))

    def _handle(self, number: int) -> None:
        if self._mapped is not None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
            zeros = _libc.mmap(*self._mapped, mmap.PROT_READ, flags, -1, 0)
            self._failed = True
            if zeros != _MAP_FAILED:
                return
        # Not of this module's making: it comes again, to whom it came before.
        _libc.signal(number, self._before)

    def guard(self, mapped: tuple[int, int], read: Callable[[], object]) -> bool:
        """Read mapped memory; returns whether that could be read.

        :param mapped: address and size of all that is read from
        """
        self._mapped, self._failed = mapped, False
        try:
            read()
        finally:
            self._mapped = None
        return not self._failed


@functools.cache
def _bus_errors() -> _BusErrors:
    return _BusErrors()


class Core:
    """The memory in an ELF core."""

    def __init__(self, path: Path, loads: Sequence[ProgramHeader]) -> None:
        """Map a core.

        :param loads: its segments, none of which overlaps another
        """
        # A segment can start anywhere in the file. Those on the grid of the largest are read here.
        largest = max(loads, key=lambda load: load.size)
        self._grid = (largest.offset - largest.physical) % PAGE_BYTES
        self._path = path
        self._file = path.open("rb")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._mapped_at = np.frombuffer(self._map, dtype=np.uint8).ctypes.data, len(self._map)
        self._failed = False
        # Page frame of each segment's first whole page, that behind its last, and where the first is.
        self._runs = []
        for load in loads:
            first = -(-load.physical // PAGE_BYTES)
            end = (load.physical + load.size) // PAGE_BYTES
            offset = load.offset + first * PAGE_BYTES - load.physical
            if offset % PAGE_BYTES == self._grid and first < end:
                self._runs.append((first, end, offset // PAGE_BYTES))
        self._views: dict[int, Things] = {}
        self._mapped = np.zeros(len(self._map) // _WINDOW + 1, dtype=bool)
        self._mapped_count = 0
        self._hidden: set[int] = set()
        self.version = 0
        """Changes with what is hidden."""

    @property
    def end(self) -> int:
        """The page frame behind the last one."""
        return max((end for _, end, _ in self._runs), default=0)

    def hide(self, physical: int, size: int) -> None:
        """Leave the pages of some bytes to drgn from now on."""
        self._hidden.update(range(physical // PAGE_BYTES, (physical + size - 1) // PAGE_BYTES + 1))
        self.version += 1

    def find(self, frames: U64) -> Places:
        """Where page frames are, in pages as :meth:`gather` counts them; -1 for those to be read by drgn."""
        at = np.full(len(frames), -1, dtype=np.int64)
        for first, end, place in self._runs:
            inside = (frames >= np.uint64(first)) & (frames < np.uint64(end))
            at[inside] = frames[inside].astype(np.int64) + (place - first)
        if self._hidden:
            at[np.isin(frames, np.array(sorted(self._hidden), dtype=np.uint64))] = -1
        return at

    def page(self, frame: int) -> bytes:
        """A page by its page frame; nothing, or less than a page, if it is to be read by drgn.

        :raises KvirtError: if the file cannot be read
        """
        for first, end, place in self._runs:
            if first <= frame < end and frame not in self._hidden:
                at = (place + frame - first) * PAGE_BYTES + self._grid
                # A system call takes half as long as to be prepared for what the mapped file may do.
                try:
                    return os.pread(self._file.fileno(), PAGE_BYTES, at)
                except OSError:
                    raise self._unreadable() from None
        return b""

    def _unreadable(self) -> KvirtError:
        return KvirtError(f"{self._path} could not be read: does its disk or file server fail?")

    def gather(self, at: Places, size: int) -> Things:
        """Things of *size* bytes, a power of two and a page at most, in an array of their own.

        :param at: where they are, in *size* bytes; pages are where :meth:`find` says
        """
        out = np.empty(len(at), dtype=f"V{size}")
        if not len(at):
            return out
        to_window = (_WINDOW // size).bit_length() - 1
        first, last = int(at.min()) >> to_window, int(at.max()) >> to_window
        if last - first < _WINDOWS_MAX:
            # As if all between were looked at.
            self._keep_small(slice(first, last + 2))
            self._guarded(lambda: _copy(self._view(size), at, out))
            return out
        for start in range(0, len(at), _WINDOWS_MAX // 2):
            part = slice(start, start + _WINDOWS_MAX // 2)
            self._keep_small(self._distinct(at[part] >> to_window))
            self._guarded(functools.partial(_copy, self._view(size), at[part], out[part]))
        return out

    def each_block(
        self, first: Places, lengths: Places, size: int, number: int, look: Callable[[Things], bool]
    ) -> bool:
        """Have runs of neighbours be looked at in their order, *number* things at a time at most.

        :param first: where the first of each run is, as for :meth:`gather`
        :param look: is given things that are gone when it returns, for it may be the file itself; and says
            whether to go on
        :returns: whether all of them were looked at
        """
        to_window = (_WINDOW // size).bit_length() - 1
        low, high = first >> to_window, (first + lengths - 1) >> to_window
        if int(high.max()) - int(low.min()) < _WINDOWS_MAX:
            self._keep_small(slice(int(low.min()), int(high.max()) + 2))
        else:
            windows = [np.arange(a, b + 1) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
            self._keep_small(self._distinct(np.concatenate(windows)))
        source = self._view(size)
        # Those that are worth a look where they are; of others some are put together first.
        alone = np.flatnonzero(lengths >= number // 2)
        begin = 0
        for run in [*alone.tolist(), len(first)]:
            others = neighbours(first[begin:run], lengths[begin:run])
            for start in range(0, len(others), number):
                if not look(self.gather(others[start : start + number], size)):
                    return False
            if run == len(first):
                break
            at, end = int(first[run]), int(first[run] + lengths[run])
            for start in range(at, end, number):
                if not self._guarded(functools.partial(look, source[start : min(start + number, end)])):
                    return False
            begin = run + 1
        return True

    def _view(self, size: int) -> Things:
        """All of the file as things of one size."""
        if size not in self._views:
            count = (len(self._map) - self._grid) // size
            self._views[size] = np.frombuffer(self._map, dtype=f"V{size}", offset=self._grid, count=count)
        return self._views[size]

    def _guarded(self, read: Callable[[], T]) -> T:
        """What *read* makes of mapped memory.

        :raises KvirtError: if that could not be read
        """
        out: list[T] = []
        self._failed |= not _bus_errors().guard(self._mapped_at, lambda: out.append(read()))
        if self._failed:
            self.ensure_whole()
            raise self._unreadable()
        return out[0]

    def ensure_whole(self) -> None:
        """See that the file is as long as it was.

        :raises KvirtError: if not, so that nothing that was read lately is to be believed
        """
        size = self._map.size()
        if size < len(self._map):
            raise KvirtError(
                f"{self._path} became shorter while it was read: of {len(self._map)} bytes it has {size}; "
                "check it again when nobody writes to it."
            )

    def _distinct(self, windows: Places) -> Places:
        """Each of some windows once. (numpy.unique() would sort them, and import numpy.ma.)"""
        some = np.zeros_like(self._mapped)
        some[windows] = True
        return np.flatnonzero(some)

    def _keep_small(self, windows: slice | Places) -> None:
        """Give back what is mapped, if it becomes too much together with what will be."""
        self._mapped_count += int(np.count_nonzero(~self._mapped[windows]))
        if self._mapped_count > _WINDOWS_MAX:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._mapped[:] = False
            self._mapped_count = int(np.count_nonzero(~self._mapped[windows]))
        self._mapped[windows] = True


def neighbours(first: Places, lengths: Places) -> Places:
    """All places of some runs, by the first of each."""
    ends = np.cumsum(lengths)
    if not len(ends):
        return np.empty(0, dtype=np.int64)
    at: Places = np.repeat(first - (ends - lengths), lengths)
    at += ramp(len(at))
    return at


# As many numbers as are wanted at once of neighbouring pages.
_RAMP = 1 << 18


def ramp(length: int) -> Places:
    """``numpy.arange(length)``, not to be written to; one that is not too long is made once."""
    return _ramp()[:length] if length <= _RAMP else np.arange(length)


@functools.cache
def _ramp() -> Places:
    numbers = np.arange(_RAMP)
    numbers.flags.writeable = False
    return numbers


def _copy(source: Things, at: Places, out: Things) -> None:
    """``out[:] = source[at]``."""
    breaks = at[1:] - at[:-1] != 1
    if int(np.count_nonzero(breaks)) * RUN > len(at):
        # Nothing is clipped: otherwise numpy would make a copy first, in case something is out of range.
        np.take(source, at, out=out, mode="clip")
        return
    starts = [0, *(np.flatnonzero(breaks) + 1).tolist()]
    _copy_pieces(source, zip(at[starts].tolist(), starts, [*starts[1:], len(at)], strict=True), out)


def _copy_pieces(source: Things, pieces: Iterable[_Piece], out: Things) -> None:
    for at, start, end in pieces:
        out[start:end] = source[at : at + end - start]


def map_core(prog: drgn.Program, path: Path) -> None:
    """Have the memory of a core be read from its file, if that is an ELF file with memory by its address.

    :param path: what *prog* was opened with
    """
    elf = read_elf_core(path) if path.is_file() else None
    if elf is None or not elf.little_endian:
        return
    loads = sorted((h for h in elf.headers if h.type == PT_LOAD and h.size), key=lambda h: h.physical)
    apart = all(a.physical + a.size <= b.physical for a, b in itertools.pairwise(loads))
    # /proc/kcore is no file with memory in it, whatever it looks like, and changes.
    if loads and apart and not prog.flags & drgn.ProgramFlags.IS_LIVE:
        prog.cache[_CACHE_KEY] = Core(path, loads)


def core_of(prog: drgn.Program) -> Core | None:
    """The core that a program's memory can be read from directly."""
    core: Core | None = prog.cache.get(_CACHE_KEY)
    return core


def unmap_core(prog: drgn.Program) -> None:
    """Have everything be read through drgn again."""
    prog.cache.pop(_CACHE_KEY, None)
