# SPDX-License-Identifier: GPL-2.0-only
"""Which architectures kvirt reads. Apart from what it knows of them, which takes longer to import."""

from __future__ import annotations

import drgn

from kvirt.errors import KvirtError

# Those that kvirt.layout has page tables for.
_READ = (drgn.Architecture.X86_64, drgn.Architecture.AARCH64)


def check_architecture(platform: drgn.Platform | None) -> drgn.Architecture:
    """Refuse what is not of an architecture that kvirt reads.

    :raises KvirtError: naming it
    """
    if platform is None:
        raise KvirtError(
            "It is not known which architecture this kernel is of; kvirt reads x86-64 and arm64 ones."
        )
    arch = platform.arch
    if arch not in _READ or not platform.flags & drgn.PlatformFlags.IS_LITTLE_ENDIAN:
        name = arch.name.lower()
        if arch in _READ:
            name = f"big-endian {name}"
        raise KvirtError(
            f"This kernel is of the architecture {name}; this version of kvirt reads x86-64 and arm64 "
            "(aarch64, little-endian) ones only, because page tables differ."
        )
    return arch
