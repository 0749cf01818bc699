# SPDX-License-Identifier: GPL-2.0-only
"""Many structures of one kind, read at once, where all of them can be read and are as they should be.

As long as nothing is in the way, that stands for the same structures looked at one by one. Whatever is, be
it damage, a change while it was read, or a part that a dump lacks, raises :class:`Unclear`, and whoever asked
has to look at them one by one, as closely as can be. On a running kernel what reaches from one page into the
next may be of two times; what looks wrong because of it is read again, and then structure by structure.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvirt.mm.pagetable import U64, Bool
from kvirt.snapshot import PAGE_BYTES, Snapshot

Rows = npt.NDArray[np.intp]
Structs = npt.NDArray[np.void]

# Structures that are read together: their pages are kept side by side until they are taken out.
_AT_ONCE = 1 << 12
_WORD = 8
_SHIFT, _WITHIN = np.uint64(PAGE_BYTES.bit_length() - 1), np.uint64(PAGE_BYTES - 1)


class Unclear(Exception):
    """Something has to be looked at more closely."""


def require(condition: object) -> None:
    """Go on only if a condition holds.

    :raises Unclear: if not
    """
    if not condition:
        raise Unclear


def all_of(mask: Bool) -> bool:
    """``mask.all()``, without the function of Python's that numpy has around it."""
    return bool(np.logical_and.reduce(mask))


def array_of(addresses: set[int]) -> U64:
    """Addresses as an array, ascending."""
    return np.array(sorted(addresses), dtype=np.uint64)


def read_structs(memory: Snapshot, dtype: np.dtype[np.void], addresses: U64) -> Structs:
    """Read structures.

    :param dtype: of ``StructLayout.dtype()``
    :param addresses: virtual addresses, in any order
    :raises Unclear: if one of them cannot be read, or is at no multiple of eight, as all are
    """
    if not len(addresses):
        return np.zeros(0, dtype=dtype)
    if len(addresses) <= _AT_ONCE:
        return _read(memory, dtype.itemsize, addresses).view(dtype)
    starts = range(0, len(addresses), _AT_ONCE)
    parts = [_read(memory, dtype.itemsize, addresses[start : start + _AT_ONCE]) for start in starts]
    return np.concatenate(parts).view(dtype)


def _read(memory: Snapshot, size: int, addresses: U64) -> Structs:
    require(not int(np.bitwise_or.reduce(addresses)) % _WORD)
    first = addresses >> _SHIFT
    # Sorted: what reaches into the next page goes on in it. (numpy.unique() would import numpy.ma.)
    pages = array_of({*first.tolist(), *((addresses + np.uint64(size - 1)) >> _SHIFT).tolist()})
    joined = memory.join((pages << _SHIFT).tolist())
    if joined is None:
        raise Unclear
    count = max(0, len(joined) - size) // _WORD + 1
    anywhere = np.ndarray((count,), dtype=f"V{size}", buffer=joined, strides=(_WORD,))
    at = np.searchsorted(pages, first) * (PAGE_BYTES // _WORD)
    at += ((addresses & _WITHIN).view(np.int64)) >> 3
    found: Structs = anywhere[at]
    return found


class Finder:
    """Finds rows by addresses, which are all different."""

    def __init__(self, addresses: U64) -> None:
        self._order = np.argsort(addresses)
        self._sorted = addresses[self._order]

    def find(self, addresses: U64) -> Rows:
        """Row of each address, -1 if there is none."""
        if not len(self._sorted):
            return np.full(len(addresses), -1, dtype=np.intp)
        at = np.searchsorted(self._sorted, addresses)
        at[at == len(self._sorted)] = 0
        return np.where(self._sorted[at] == addresses, self._order[at], -1)
