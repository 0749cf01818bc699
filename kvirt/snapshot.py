# SPDX-License-Identifier: GPL-2.0-only
"""Kernel memory as one pass over it sees it: each page is read once, whatever is taken from it.

VMAs, AVCs, anon_vmas and maple nodes lie side by side in slabs, so one read serves dozens of them. A reader
with small reads pays for each of them, and while a kernel runs sees neighbours at different times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import drgn

# Bytes read at once: no kernel has smaller pages.
PAGE_BYTES = 4096
_WITHIN = PAGE_BYTES - 1
# Pages that are kept. When there are more, all are read anew: it only takes longer.
_PAGES_MAX = 1 << 13

T = TypeVar("T")


class Readable(Protocol):
    """What kernel memory can be read from: a program, or a snapshot of it."""

    def read(self, address: int, size: int, /) -> bytes:
        """Read virtual memory.

        :raises drgn.FaultError: if it cannot be read
        """


class Snapshot:
    """Pages of one program's memory.

    Nothing in it becomes newer: whoever wants to read again takes a new one.
    """

    def __init__(self, prog: drgn.Program, read_page: Callable[[int], bytes] = lambda start: b"") -> None:
        """Prepare.

        :param read_page: reads a page at an address faster than the program does, or gives less than a page
        """
        self._prog, self._read_page = prog, read_page
        self._pages: dict[int, bytes] = {}

    def read(self, address: int, size: int, /) -> bytes:
        """Read virtual memory.

        :raises drgn.FaultError: if it cannot be read
        """
        at = address & _WITHIN
        try:
            data = self._pages[address - at][at : at + size]
        except KeyError:
            data = self._load(address - at)[at : at + size]
        if len(data) != size:
            # It reaches into the next page, or a part of the page cannot be read.
            data = self._prog.read(address, size)
        return data

    def join(self, starts: Sequence[int]) -> bytes | None:
        """Read whole pages, and put them side by side; None if one of them cannot be read.

        :param starts: their virtual addresses
        """
        known = self._pages
        pages = [known[start] if start in known else self._load(start) for start in starts]
        return b"".join(pages) if all(pages) else None

    def _load(self, start: int) -> bytes:
        if len(self._pages) >= _PAGES_MAX:
            self._pages.clear()
        page = self._read_page(start)
        if len(page) < PAGE_BYTES:
            try:
                page = self._prog.read(start, PAGE_BYTES)
            except (drgn.FaultError, OverflowError):
                page = b""
        self._pages[start] = page
        return page


class Table(dict[int, T]):
    """Structures by address, read when they are asked for."""

    def __init__(self, read: Callable[[int], T]) -> None:
        self._read = read

    def __missing__(self, address: int) -> T:
        one = self[address] = self._read(address)
        return one
