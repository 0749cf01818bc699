# SPDX-License-Identifier: GPL-2.0-only
"""Addresses of the running kernel's functions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from kvirt.errors import KvirtError

KALLSYMS = Path("/proc/kallsyms")


def function_addresses(names: Iterable[str], path: Path = KALLSYMS) -> dict[str, list[int]]:
    """Find functions of the kernel proper by their exact names; those not there are left out.

    More than one address: different functions of one name, of which none can be probed by it.

    :raises KvirtError: if the addresses are hidden
    """
    wanted = "|".join(map(re.escape, sorted(names))).encode()
    # Functions of modules have the module's name behind them.
    pattern = re.compile(rb"^([0-9a-f]+) [tTwW] (" + wanted + rb")$", re.MULTILINE)
    try:
        symbols = path.read_bytes()
    except OSError as error:
        raise KvirtError(
            f"{path} cannot be read ({error.strerror}): tracing needs CONFIG_KALLSYMS, and /proc."
        ) from error
    found: dict[str, list[int]] = {}
    for match in pattern.finditer(symbols):
        found.setdefault(match[2].decode(), []).append(int(match[1], 16))
    if found and not any(any(addresses) for addresses in found.values()):
        raise KvirtError(
            "The kernel hides the addresses of its functions even from root: run "
            "`sysctl kernel.kptr_restrict=1` before tracing."
        )
    return found
