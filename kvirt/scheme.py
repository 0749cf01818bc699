# SPDX-License-Identifier: GPL-2.0-only
"""The schemes by which anonymous folios are indexed, and how to tell which one a kernel has.

Common to all that learn a kernel's layout, from whatever source; nothing here needs drgn.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

from kvirt.errors import KvirtError


class Scheme(enum.StrEnum):
    """Which page offset indexes an anonymous folio of a private file mapping."""

    ANON_PGOFF = "anon_pgoff"
    """``__vm_anon_pgoff_lo/_hi``: Linux 7.3 and later."""
    VIRT_PGOFF = "virt_pgoff"
    """``__vm_virt_pgoff_lo/_hi``: the series before it was merged."""
    LEGACY = "legacy"
    """``vm_pgoff``, the file offset: Linux 7.2 and earlier."""


# include/linux/mm.h. Newer kernels also have them as enumerators, which are preferred.
VM_FLAG_BITS = {
    "READ": 0,
    "WRITE": 1,
    "EXEC": 2,
    "SHARED": 3,
    "MAYWRITE": 5,
    "MAYSHARE": 7,
    "GROWSDOWN": 8,
    "PFNMAP": 10,
    "IO": 14,
    "SEQ_READ": 15,
    "RAND_READ": 16,
    "HUGETLB": 22,
    "MIXEDMAP": 28,
}

_PGOFF_MEMBER = re.compile(r"^(?:__)?vm_(virt|anon)_pgoff(_lo|_hi)?$")


def detect_scheme(members: Sequence[str], copy_vma: Sequence[str] | None) -> Scheme:
    """Tell the scheme by the members of struct vm_area_struct and the prototype of copy_vma().

    :param members: names of all members, anonymous ones looked through
    :param copy_vma: names of copy_vma()'s parameters, None if its prototype is not known
    :raises KvirtError: if the witnesses contradict each other
    """
    styles: dict[str, set[str]] = {}
    for name in members:
        if match := _PGOFF_MEMBER.match(name):
            styles.setdefault(match[1], set()).add(name)
    if len(styles) > 1:
        names = ", ".join(sorted(set().union(*styles.values())))
        raise KvirtError(
            f"struct vm_area_struct of this kernel has page offsets of more than one kind ({names}): "
            "kvirt will not guess which one indexes folios; please report this kernel's version."
        )
    style = next(iter(styles), None)
    if style is not None and not {f"__vm_{style}_pgoff_lo", f"__vm_{style}_pgoff_hi"} <= styles[style]:
        names = ", ".join(sorted(styles[style]))
        raise KvirtError(
            f"struct vm_area_struct of this kernel spells its second page offset in an unknown way "
            f"({names}): this version of kvirt cannot read it; please report this kernel's version."
        )
    witness = None
    if copy_vma is not None:
        named = [m[1] for p in copy_vma if (m := re.match(r"^(virt|anon)_pgoff$", p))]
        witness = named[0] if named else ""
    if witness is not None and witness != (style or ""):
        raise KvirtError(
            "struct vm_area_struct and the prototype of copy_vma() of this kernel disagree on whether "
            "there is a second page offset: kvirt will not guess; check that the debug file belongs to "
            "this kernel, and report its version."
        )
    return {None: Scheme.LEGACY, "anon": Scheme.ANON_PGOFF, "virt": Scheme.VIRT_PGOFF}[style]
