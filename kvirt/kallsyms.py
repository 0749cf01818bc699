# SPDX-License-Identifier: GPL-2.0-only
"""Symbols by name out of the kernel's own table as it is in memory (kernel/kallsyms.c).

drgn reads this table too, and makes an index of all of it in advance, which is most of what starting without
debug information takes. Here names stay packed: only those are unpacked that have as many characters as the
one that is asked for, and the same sum of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import drgn
import numpy as np
import numpy.typing as npt

from kvirt.proc_kallsyms import kallsyms_symbol
from kvirt.vmcoreinfo import vmcoreinfo_symbols

# scripts/kallsyms.c: codes that names are made of. One more stands for the bytes that tell a name's length.
_CODES = 256
# More symbols, and a longer table of their names, than any kernel has.
_SYMBOLS_MAX, _BYTES_MAX = 1 << 22, 1 << 27


class Kallsyms:
    """The table of one kernel."""

    def __init__(self, prog: drgn.Program) -> None:
        """Read them.

        :raises ValueError: if the table is of a kind that is not known here
        :raises LookupError: if the kernel does not tell where it is
        :raises drgn.FaultError: if it cannot be read
        """
        told = vmcoreinfo_symbols(prog)
        count = int.from_bytes(prog.read(told["kallsyms_num_syms"], 4), "little")
        # Behind the names come the marks in them, and then the codes.
        size = told["kallsyms_token_table"] - told["kallsyms_names"]
        if not (0 < count <= _SYMBOLS_MAX and 0 < size <= _BYTES_MAX):
            raise ValueError("the table of symbols has no sensible size")
        self._tokens = _tokens(prog, told)
        self._names = prog.read(told["kallsyms_names"], size)
        self._firsts, self._starts = _walk(self._names, count)
        codes = np.frombuffer(self._names, dtype=np.uint8)[: self._firsts[-1]].astype(np.uint16)
        lengths = np.array([*map(len, self._tokens), 0], dtype=np.int32)
        sums = np.array([*map(sum, self._tokens), 0], dtype=np.int32)
        letters = np.array([token[0] if token else 0 for token in self._tokens], dtype=np.int32)
        # The first character of a name is a letter that tells what it is.
        first = letters[codes[self._starts]]
        for place in (self._firsts[:-1], self._starts - 1):
            codes[place] = _CODES
        self._lengths = np.add.reduceat(lengths[codes], self._firsts[:-1]) - 1
        self._sums = np.add.reduceat(sums[codes], self._firsts[:-1]) - first
        self._addresses = self._read_addresses(prog, told, count)

    def _spelled(self, name: str) -> Iterator[tuple[int, str]]:
        """Numbers of the symbols of a name, and their letters."""
        wanted = name.encode()
        alike = (self._lengths == len(wanted)) & (self._sums == sum(wanted))
        for number in np.flatnonzero(alike).tolist():
            packed = self._names[self._starts[number] : self._firsts[number + 1]]
            spelled = b"".join([self._tokens[code] for code in packed])
            if spelled[1:] == wanted:
                yield number, chr(spelled[0])

    def find(self, name: str) -> Iterator[drgn.Symbol]:
        """All symbols of a name; their sizes are what is free behind them."""
        for number, letter in self._spelled(name):
            address = int(self._addresses[number])
            behind = int(np.searchsorted(self._addresses, np.uint64(address), side="right"))
            end = int(self._addresses[behind]) if behind < len(self._addresses) else address
            yield kallsyms_symbol(name, letter, address, end)

    def _read_addresses(self, prog: drgn.Program, told: dict[str, int], count: int) -> npt.NDArray[np.uint64]:
        """Follow kallsyms_sym_address() of whichever kernel this is: one symbol's address is known."""
        [(stext, _)] = self._spelled("_stext")
        place = told["kallsyms_offsets"]
        offsets = np.frombuffer(prog.read(place, 4 * count), dtype="<i4").astype(np.int64)
        ways = [offsets + (place - (1 << 64)) + 4 * np.arange(count)]
        if "kallsyms_relative_base" in told:
            base = prog.read_u64(told["kallsyms_relative_base"]) - (1 << 64)
            ways += [(offsets & 0xFFFFFFFF) + base, np.where(offsets >= 0, offsets, base - 1 - offsets)]
        for way in ways:
            if int(way[stext]) & (1 << 64) - 1 == told["_stext"]:
                return way.view(np.uint64)
        raise ValueError("the addresses of symbols are stored in an unknown way")


def _tokens(prog: drgn.Program, told: dict[str, int]) -> list[bytes]:
    """What each code stands for."""
    index = np.frombuffer(prog.read(told["kallsyms_token_index"], 2 * _CODES), dtype="<u2").tolist()
    table = prog.read(told["kallsyms_token_table"], index[-1] + 256)
    return [table[at : table.index(b"\0", at)] for at in index]


def _walk(names: bytes, count: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Where each name's length is, and where the last one ends; and where the codes of each start."""
    firsts, starts = [], []
    at = 0
    try:
        for _ in range(count):
            firsts.append(at)
            length = names[at]
            at += 1
            if length & 0x80:
                # One more byte of length (ULEB128).
                length = length & 0x7F | names[at] << 7
                at += 1
            if not length:
                raise ValueError("a symbol has no name")
            starts.append(at)
            at += length
    except IndexError:
        at = len(names) + 1
    if at > len(names):
        raise ValueError("the names of symbols have no end")
    return np.array([*firsts, at]), np.array(starts)
