# SPDX-License-Identifier: GPL-2.0-only
"""What the kernel tells debuggers of itself in numbers (kernel/vmcore_info.c)."""

from __future__ import annotations

from collections.abc import Iterator

import drgn


def _lines(prog: drgn.Program) -> Iterator[tuple[str, str]]:
    for line in prog["VMCOREINFO"].string_().decode(errors="replace").splitlines():
        key, _, value = line.partition("=")
        yield key, value


def vmcoreinfo_number(prog: drgn.Program, name: str) -> int | None:
    """A number of VMCOREINFO, ``VMCOREINFO_NUMBER(name)``; None if this kernel does not tell it."""
    return next((int(value, 0) for key, value in _lines(prog) if key == f"NUMBER({name})"), None)


def vmcoreinfo_symbols(prog: drgn.Program) -> dict[str, int]:
    """Addresses of symbols in VMCOREINFO, ``VMCOREINFO_SYMBOL(name)``, by their names."""
    return {
        key.removeprefix("SYMBOL(").removesuffix(")"): int(value, 16)
        for key, value in _lines(prog)
        if key.startswith("SYMBOL(")
    }
