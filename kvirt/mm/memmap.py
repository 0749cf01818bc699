# SPDX-License-Identifier: GPL-2.0-only
"""The struct pages of many page frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import drgn
import numpy as np
import numpy.typing as npt

from kvirt.layout import Layout
from kvirt.memory import Core, Places, Runs, Things, core_of, neighbours, ramp, runs_of
from kvirt.mm.arrays import Column, is_constant
from kvirt.mm.pagetable import U64, Bool, kernel_huge_page
from kvirt.snapshot import PAGE_BYTES

Members = dict[str, npt.NDArray[Any]]

# Struct pages this close are read together: one read of 16 KiB costs less than two of 64 bytes.
_GAP_PAGES = 256
# And a run ends here, so that one bad spot does not spoil much and memory stays bounded.
_RUN_PAGES = 1 << 16
# Pages of which more than one in so many is not behind the one before are scattered.
_SCATTERED = 4
# Struct pages that are copied together, and taken apart while they are in the processor's cache.
_BLOCK_PAGES = 1 << 13
# Struct pages that are put together side by side, for a processor's wide instructions.
_FOLD = 64
_NONE: Mapping[str, int] = MappingProxyType({})
# Page frames that lie so dense are not sorted: so many struct pages are read for each.
_DENSE = 2
# Those that are held at once when drgn reads them, with all between them.
_POOL_PAGES = 1 << 18
_CACHE_KEY = "kvirt.memmap"
_ULONG_MAX = (1 << 64) - 1
# Sections so close are looked up with all between them.
_NEAR = 256
# Not looked up yet, and nowhere in the core or not in one piece.
_UNKNOWN, _NOWHERE = -2, -1


def read_struct_pages(
    prog: drgn.Program,
    layout: Layout,
    pfns: U64,
    names: Sequence[str],
    masks: Mapping[str, int] = _NONE,
    unless: Mapping[str, int] = _NONE,
) -> tuple[Members, Bool]:
    """Members of the struct pages of page frames in any order, and which could be read.

    :param names: of ``layout.page_dtype``
    :param masks: by name, the bits that are told; all of them if it is not there
    :param unless: by name, bits that matter: as long as no page has one of them, the member is 0
    :returns: an array for each of them, with 0 for what could not be read; constants where all agree
    """
    members, readable = _read_struct_pages(prog, layout, pfns, names, masks, unless)
    for name, mask in masks.items():
        values = members[name]
        if not is_constant(values):
            values &= values.dtype.type(mask)
    return members, readable


def _read_struct_pages(
    prog: drgn.Program,
    layout: Layout,
    pfns: U64,
    names: Sequence[str],
    masks: Mapping[str, int],
    unless: Mapping[str, int],
) -> tuple[Members, Bool]:
    """As :func:`read_struct_pages`; of what is not constant all bits are told."""
    core = core_of(prog)
    sections = None if core is None else _sections(prog, layout, core)
    if core is None or sections is None or not len(pfns):
        return _read_any(prog, layout, pfns, names)
    frames = runs_of(pfns.view(np.int64), _SCATTERED)
    runs = None if frames is None else sections.find_runs(frames)
    if runs is not None:
        return _gather_runs(core, layout, runs, names, masks, unless), np.ones(len(pfns), dtype=bool)
    at = sections.find_near(pfns)
    if at is not None:
        return _gather(core, layout, at, names), np.ones(len(pfns), dtype=bool)
    at = sections.find(pfns)
    good = at >= 0
    out = _none(layout, len(pfns), names)
    here = _gather(core, layout, at[good], names)
    rest, rest_good = _read_any(prog, layout, pfns[~good], names)
    for name in names:
        out[name][good], out[name][~good] = here[name], rest[name]
    good[~good] = rest_good
    return out, good


def _sections(prog: drgn.Program, layout: Layout, core: Core) -> _Sections | None:
    """Where the memmap is in a core; None if struct pages do not fit into its pages."""
    size = layout.page.size
    if size & (size - 1):
        return None
    sections = prog.cache.get(_CACHE_KEY)
    if not isinstance(sections, _Sections) or sections.core is not core or sections.version != core.version:
        sections = prog.cache[_CACHE_KEY] = _Sections(prog, layout, core)
    return sections


def _gather(core: Core, layout: Layout, at: Places, names: Sequence[str]) -> Members:
    out = {name: np.empty(len(at), dtype=layout.page_dtype[name]) for name in names}
    for start in range(0, len(at), _BLOCK_PAGES):
        part = slice(start, start + _BLOCK_PAGES)
        pages = core.gather(at[part], layout.page.size).view(layout.page_dtype)
        for name in names:
            out[name][part] = pages[name]
    return out


def _gather_runs(
    core: Core,
    layout: Layout,
    runs: Runs,
    names: Sequence[str],
    masks: Mapping[str, int],
    unless: Mapping[str, int],
) -> Members:
    number, dtype = runs.total, layout.page_dtype
    columns = {name: Column(dtype[name], number, masks.get(name, -1), unless.get(name)) for name in names}
    order = [(dtype.names or ()).index(name) for name in names]

    def put(things: Things) -> bool:
        pages = things.view(layout.page_dtype)
        every, some = _agreement(things, layout)
        for at, (name, column) in zip(order, columns.items(), strict=True):
            column.put(pages[name], every[at], some[at])
        return True

    core.each_block(runs.first, runs.lengths, layout.page.size, _BLOCK_PAGES, put)
    return {name: column.array() for name, column in columns.items()}


def _agreement(things: Things, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The bits that each member of ``layout.page_dtype`` has in every one of some struct pages, and in any.

    In two passes over all of it, side by side: members far apart would take one each.
    """
    words = things.view("<u8").reshape(len(things), -1)
    if not words.flags.aligned:
        # A core's memory may begin at any multiple of four, and numpy is slow with what is not aligned.
        words = things.view("<u4").reshape(len(things), -1)
    whole = len(words) // _FOLD * _FOLD
    both = []
    for ufunc in (np.bitwise_and, np.bitwise_or):
        some = words
        if whole:
            folded = ufunc.reduce(words[:whole].reshape(whole // _FOLD, -1), axis=0)
            if whole < len(words):
                # With some of those before once more, which changes nothing.
                ufunc(folded, words[-_FOLD:].reshape(-1), out=folded)
            some = folded.reshape(_FOLD, -1)
        both.append(ufunc.reduce(some, axis=0).view(layout.page_dtype)[0].item())
    return both[0], both[1]


class _Common:
    """What struct pages have in common, as long as they differ in an index alone that rises by one."""

    def __init__(
        self, layout: Layout, names: Sequence[str], masks: Mapping[str, int], numbers: Places | None = None
    ) -> None:
        """Prepare.

        :param numbers: which of them each is, in the order in which they are looked at; None for that itself
        """
        self._dtype, self._numbers = layout.page_dtype, numbers
        self._masks = {name: masks.get(name, -1) for name in names}
        self._values: dict[str, Any] = {}
        # The index of the first of them, and how many were looked at.
        self._base, self._seen = np.uint64(0), 0

    def look(self, things: Things) -> bool:
        """Whether some more are like those before."""
        pages = things.view(self._dtype)
        for name, mask in self._masks.items():
            column, value = _aligned(pages[name]), self._values.get(name)
            if mask == -1:
                value = column[0] if value is None else value
                alike = bool((column == value).all())
            else:
                # Without an array of what the mask leaves.
                some = int(np.bitwise_or.reduce(column)) & mask
                value = some if value is None else value
                alike = some == value and (not some or int(np.bitwise_and.reduce(column)) & mask == some)
            if not alike:
                return False
            self._values[name] = value
        begin, self._seen = self._seen, self._seen + len(things)
        index = _aligned(pages["index"])
        if self._numbers is None:
            base = index - ramp(len(index)).view(np.uint64)
            base -= np.uint64(begin)
        else:
            base = index - self._numbers[begin : self._seen].view(np.uint64)
        if not begin:
            self._base = base[0]
        return bool((base == self._base).all())

    def members(self) -> dict[str, int]:
        """What they have in common, and the index of the first."""
        return {**{name: int(value) for name, value in self._values.items()}, "index": int(self._base)}


def _aligned(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy, if need be: a core's memory may begin at any multiple of four, and numpy is slow with that."""
    return column if column.flags.aligned else column.copy()


def read_uniform(
    prog: drgn.Program,
    layout: Layout,
    frames: Runs,
    names: Sequence[str],
    masks: Mapping[str, int] = _NONE,
) -> dict[str, int] | None:
    """What the struct pages of page frames have in common, if they differ in their index alone.

    That rises by one from each to the next. Nothing is said where one of the struct pages cannot be read, nor
    where drgn has to read them and page frames that follow one another make more than a few runs.

    :param frames: at least one
    :param names: of ``layout.page_dtype``: the members that must agree
    :param masks: by name, the bits that must; all of them if it is not there
    :returns: by name; ``index`` is that of the first
    """
    core = core_of(prog)
    if core is None:
        if _are_scattered(frames):
            return None
        runs, numbers = _in_order(frames)
        if len(runs.first) * _GAP_PAGES > frames.total and len(runs.first) > 1:
            return None
        common = _Common(layout, names, masks, numbers)
        whole = _Reader(prog, layout).each_block(runs, common.look)
        return common.members() if whole else None
    sections = _sections(prog, layout, core)
    if sections is None:
        return None
    found = None if _are_scattered(frames) else sections.find_runs(frames)
    if found is not None:
        runs, numbers = _in_order(found)
        common = _Common(layout, names, masks, numbers)
        whole = core.each_block(runs.first, runs.lengths, layout.page.size, _BLOCK_PAGES, common.look)
        return common.members() if whole else None
    pfns = frames.each().view(np.uint64)
    at = sections.find_near(pfns)
    if at is None:
        at = sections.find(pfns)
        if (at < 0).any():
            return None
    common = _Common(layout, names, masks)
    for start in range(0, len(at), _BLOCK_PAGES):
        if not common.look(core.gather(at[start : start + _BLOCK_PAGES], layout.page.size)):
            return None
    return common.members()


def _are_scattered(runs: Runs) -> bool:
    return len(runs.first) > 1 and len(runs.first) * _SCATTERED > runs.total


def _in_order(runs: Runs) -> tuple[Runs, Places | None]:
    """Longer runs that hold the same, in the order of the memmap, and which thing of the old runs each is.

    The kernel gives out large blocks from the last to the first: then all of them are one run.
    """
    if len(runs.first) == 1:
        return runs, None
    order = np.argsort(runs.first)
    first, lengths = runs.first[order], runs.lengths[order]
    begins = (np.cumsum(runs.lengths) - runs.lengths)[order]
    numbers = neighbours(begins, lengths)
    starts = np.flatnonzero(np.append(True, first[1:] != first[:-1] + lengths[:-1]))
    return Runs(first[starts], np.add.reduceat(lengths, starts)), numbers


class _Sections:
    """Where in a core the memmap is, by the huge pages that the kernel maps it with."""

    def __init__(self, prog: drgn.Program, layout: Layout, core: Core) -> None:
        self._prog, self._layout = prog, layout
        self.core, self.version = core, core.version
        # Page frames of one section, in a number of bits.
        self._size = layout.pgtable.huge_size
        self._bits = (self._size // layout.page.size).bit_length() - 1
        self._inside = (1 << self._bits) - 1
        # What is beyond all memory of the core has no struct page either, or one that drgn may look for: the
        # last section stands for all of it.
        self._start = np.full((core.end >> self._bits) + 2, _UNKNOWN, dtype=np.int64)
        self._start[-1] = _NOWHERE

    def find_runs(self, frames: Runs) -> Runs | None:
        """Where the struct pages of page frames are, in their size; None if one may be nowhere."""
        # Each section is somewhere else: those that go beyond one are cut.
        first, lengths = frames
        last = first + lengths - 1
        pieces = (last >> self._bits) - (first >> self._bits) + 1
        if (pieces > 1).any():
            section = neighbours(first >> self._bits, pieces)
            first = np.maximum(np.repeat(first, pieces), section << self._bits)
            lengths = np.minimum(np.repeat(last, pieces), section << self._bits | self._inside) - first + 1
        at = self.find(first.view(np.uint64))
        return None if (at < 0).any() else Runs(at, lengths)

    def find_near(self, pfns: U64) -> Places | None:
        """As :meth:`find`, of page frames not too far apart; None if they are, or if one may be nowhere."""
        first, last = int(pfns.min()) >> self._bits, int(pfns.max()) >> self._bits
        if last >= len(self._start) or last - first >= _NEAR:
            return None
        around = self._start[first : last + 1]
        for section in (np.flatnonzero(around == _UNKNOWN) + first).tolist():
            self._start[section] = self._locate(section)
        if (around < 0).any():
            return None
        # How far each section's struct pages are from their page frames.
        away = around - (np.arange(first, last + 1) << self._bits)
        frames = pfns.view(np.int64)
        at: Places = frames + (away[0] if first == last else away[(frames >> self._bits) - first])
        return at

    def find(self, pfns: U64) -> Places:
        """Where the struct pages of page frames are, in their size; negative where drgn has to read them."""
        number = np.minimum(pfns >> np.uint64(self._bits), np.uint64(len(self._start) - 1)).astype(np.int64)
        start = self._start[number]
        unknown = start == _UNKNOWN
        if unknown.any():
            for section in np.flatnonzero(np.bincount(number[unknown])).tolist():
                self._start[section] = self._locate(section)
            start = self._start[number]
        inside = (pfns & np.uint64(self._inside)).astype(np.int64)
        at: Places = np.where(start < 0, start, start + inside)
        return at

    def _locate(self, section: int) -> int:
        """Where a section's first struct page is."""
        address = self._layout.vmemmap + section * self._size
        physical = kernel_huge_page(self._prog, self._layout.pgtable, address)
        if physical is None or address % self._size:
            return _NOWHERE
        frames = np.arange(self._size // PAGE_BYTES, dtype=np.uint64) + np.uint64(physical // PAGE_BYTES)
        places = self.core.find(frames)
        if places[0] < 0 or (np.diff(places) != 1).any():
            return _NOWHERE
        return int(places[0]) * (PAGE_BYTES // self._layout.page.size)


def _read_any(prog: drgn.Program, layout: Layout, pfns: U64, names: Sequence[str]) -> tuple[Members, Bool]:
    """As :func:`read_struct_pages`, through drgn."""
    if not len(pfns):
        return _none(layout, 0, names), np.ones(0, dtype=bool)
    in_order = _runs(pfns) if len(pfns) <= _POOL_PAGES else None
    first, sizes = in_order or _near(pfns)
    total = int(sizes.sum())
    if total > _POOL_PAGES:
        # Both halves have something in them, however far away a wild one is.
        lower = pfns <= first[0] + (pfns.max() - first[0]) // np.uint64(2)
        out, good = _none(layout, len(pfns), names), np.ones(len(pfns), dtype=bool)
        for part in (lower, ~lower):
            some, good[part] = _read_any(prog, layout, pfns[part], names)
            for name in names:
                out[name][part] = some[name]
        return out, good
    ends = np.cumsum(sizes)
    pool, readable = np.zeros(total, dtype=layout.page_dtype), np.ones(total, dtype=bool)
    reader = _Reader(prog, layout)
    for pfn, size, end in zip(first.tolist(), sizes.tolist(), ends.tolist(), strict=True):
        reader.read_neighbours(pfn, pool[end - size : end], readable[end - size : end])
    if in_order is not None:
        return {name: pool[name].copy() for name in names}, readable
    starts = first - (ends - sizes)
    base = starts[0] if len(starts) == 1 else starts[np.searchsorted(first, pfns, side="right") - 1]
    at = (pfns - base).astype(np.intp)
    return {name: pool[name].take(at) for name in names}, readable.take(at)


def _runs(pfns: U64) -> tuple[U64, U64] | None:
    """Runs of neighbours in their order: the first of each, and how many; None if these are short."""
    runs = runs_of(pfns.view(np.int64), _GAP_PAGES)
    return None if runs is None else (runs.first.view(np.uint64), runs.lengths.view(np.uint64))


def _near(pfns: U64) -> tuple[U64, U64]:
    """Runs with the page frames in them: the first of each, and how many, in ascending order."""
    low, high = pfns.min(), pfns.max()
    if high - low < np.uint64(_DENSE * len(pfns)):
        return np.array([low]), np.array([high - low + np.uint64(1)])
    ascending = np.sort(pfns)
    breaks = np.flatnonzero(np.diff(ascending) > _GAP_PAGES)
    first = ascending[np.concatenate(([0], breaks + 1))]
    return first, ascending[np.concatenate((breaks, [-1]))] - first + np.uint64(1)


def _none(layout: Layout, number: int, names: Sequence[str]) -> Members:
    return {name: np.zeros(number, dtype=layout.page_dtype[name]) for name in names}


class _Reader:
    """Reads struct pages of page frames that follow one another."""

    def __init__(self, prog: drgn.Program, layout: Layout) -> None:
        self._prog, self._base, self._size = prog, layout.vmemmap, layout.page.size
        # A page frame that no memory can have is damage, and its struct page may lie past the last address.
        frames = 1 << (layout.pgtable.physical_bits - layout.page_shift)
        self._limit = min(frames, ((1 << 64) - self._base) // self._size)

    def read_neighbours(self, first: int, out: npt.NDArray[np.void], good: Bool) -> None:
        """Fill *out*, and say in *good* which could be read; those that could not keep what is there.

        :param first: the page frame of the first
        """
        valid = max(0, min(len(out), self._limit - first))
        good[valid:] = False
        for start in range(0, valid, _RUN_PAGES):
            part = slice(start, min(start + _RUN_PAGES, valid))
            self._read(first + start, out[part], good[part])

    def each_block(self, runs: Runs, look: Callable[[Things], bool]) -> bool:
        """As :meth:`kvirt.memory.Core.each_block`; False too if not all of it can be read."""
        room = np.empty(_BLOCK_PAGES, dtype=f"V{self._size}")
        filled = 0
        for first, left in zip(runs.first.tolist(), runs.lengths.tolist(), strict=True):
            if first < 0 or first + left > self._limit:
                return False
            while left:
                number = min(left, len(room) - filled)
                try:
                    data = self._prog.read(self._base + first * self._size, number * self._size)
                except drgn.FaultError:
                    return False
                first, left = first + number, left - number
                things = np.frombuffer(data, dtype=room.dtype)
                if number < len(room):
                    # Short runs are put together first.
                    room[filled : filled + number] = things
                    filled += number
                    if filled < len(room):
                        continue
                    things, filled = room, 0
                if not look(things):
                    return False
        return not filled or look(room[:filled])

    def _read(self, first: int, out: npt.NDArray[np.void], good: Bool) -> None:
        try:
            data = self._prog.read(self._base + first * self._size, len(out) * self._size)
        except drgn.FaultError:
            if len(out) == 1:
                good[0] = False
                return
            # Halve until the bad ones are alone; there are few.
            middle = len(out) // 2
            self._read(first, out[:middle], good[:middle])
            self._read(first + middle, out[middle:], good[middle:])
            return
        # As bytes, which are copied in one piece.
        out.view(np.uint8)[:] = np.frombuffer(data, dtype=np.uint8)
