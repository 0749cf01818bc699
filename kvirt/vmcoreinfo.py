# SPDX-License-Identifier: GPL-2.0-only
"""What the kernel tells debuggers of itself in numbers (kernel/vmcore_info.c)."""

from __future__ import annotations

import drgn


def vmcoreinfo_number(prog: drgn.Program, name: str) -> int | None:
    """A number of VMCOREINFO, ``VMCOREINFO_NUMBER(name)``; None if this kernel does not tell it."""
    for line in prog["VMCOREINFO"].string_().decode(errors="replace").splitlines():
        key, _, value = line.partition("=")
        if key == f"NUMBER({name})":
            return int(value, 0)
    return None
