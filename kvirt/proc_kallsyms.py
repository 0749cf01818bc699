# SPDX-License-Identifier: GPL-2.0-only
"""Symbols by name out of /proc/kallsyms, which is as long as a book: it is searched, and not taken apart."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import drgn

# Symbols of the same address, and the lines of so many.
_ALIASES, _ALIASES_BYTES = 64, 64 * 100


def kallsyms_symbol(name: str, letter: str, start: int, end: int) -> drgn.Symbol:
    """A symbol, of which nm(1)'s letter tells what it is."""
    binding = drgn.SymbolBinding.GLOBAL if letter.isupper() else drgn.SymbolBinding.LOCAL
    kind = drgn.SymbolKind.FUNC if letter in "tT" else drgn.SymbolKind.OBJECT
    return drgn.Symbol(name, start, end - start, binding, kind)


class ProcKallsyms:
    """The text of /proc/kallsyms."""

    def __init__(self, text: bytes) -> None:
        self._text = b"\n" + text

    def find(self, name: str) -> Iterator[drgn.Symbol]:
        """All symbols of a name; their sizes are what is free behind them."""
        # Those of modules have "[module]" behind their names.
        wanted, at = f" {name}\n".encode(), -1
        while (at := self._text.find(wanted, at + 1)) >= 0:
            address, letter = self._text[self._text.rindex(b"\n", 0, at) + 1 : at].split(b" ")
            start = int(address, 16)
            yield kallsyms_symbol(name, letter.decode(), start, self._next(at + len(wanted), start))

    def _next(self, at: int, address: int) -> int:
        """Address of the first symbol from a line on that lies higher: they are sorted, but for modules."""
        for line in islice(self._text[at : at + _ALIASES_BYTES].split(b"\n"), _ALIASES):
            if (behind := int(line.partition(b" ")[0] or b"0", 16)) > address:
                return behind
        return address

    def __bool__(self) -> bool:
        """Whether it has addresses: they are 0 for those that kptr_restrict keeps them from, root too."""
        return any(symbol.address for symbol in self.find("_stext"))
