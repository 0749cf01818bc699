# SPDX-License-Identifier: GPL-2.0-only
"""Addresses of the running kernel's functions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvirt.errors import KvirtError

KALLSYMS = Path("/proc/kallsyms")
# As nm(1) and kernel/module/kallsyms.c have it: text, local or not, or weak.
_FUNCTIONS = (b"t", b"T", b"w", b"W")


def function_addresses(names: Iterable[str], path: Path = KALLSYMS) -> dict[str, list[int]]:
    """Find functions of the kernel proper by their exact names; those not there are left out.

    More than one address: different functions of one name, of which none can be probed by it.

    :raises KvirtError: if the addresses are hidden
    """
    try:
        symbols = path.read_bytes()
    except OSError as error:
        raise KvirtError(
            f"{path} cannot be read ({error.strerror}): tracing needs CONFIG_KALLSYMS, and /proc."
        ) from error
    found: dict[str, list[int]] = {}
    for name in names:
        # Functions of modules have the module's name behind them. A search for each name is many times faster
        # than an expression for all of them, and others want the interpreter meanwhile.
        line_end = f" {name}\n".encode()
        at = symbols.find(line_end)
        while at != -1:
            address, _, kind = symbols[symbols.rfind(b"\n", 0, at) + 1 : at].partition(b" ")
            if kind in _FUNCTIONS:
                found.setdefault(name, []).append(int(address, 16))
            at = symbols.find(line_end, at + 1)
    if found and not any(any(addresses) for addresses in found.values()):
        raise KvirtError(
            "The kernel hides the addresses of its functions even from root: run "
            "`sysctl kernel.kptr_restrict=1` before tracing."
        )
    return found
