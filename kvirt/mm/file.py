# SPDX-License-Identifier: GPL-2.0-only
"""The file behind a VMA: which pages are its own, and how large they are."""

from __future__ import annotations

from typing import NamedTuple

from kvirt.layout import S_DAX, Layout
from kvirt.snapshot import Readable


class File(NamedTuple):
    """What matters here of a ``struct file``."""

    f_mapping: int
    """Its ``struct address_space *``, to which folios of its pages point."""
    blkbits: int
    """``i_blkbits``: on hugetlbfs ``huge_page_shift()``, the only size that it maps."""
    dax: bool
    """``IS_DAX()``: its pages are the storage itself."""


def read_file(memory: Readable, layout: Layout, address: int) -> File:
    """Read a file and its inode (``f_mapping->host``).

    :param address: of the ``struct file``
    :raises drgn.FaultError: if one of them cannot be read
    """
    mapping = layout.file.read_member(memory, address, "f_mapping")
    inode = layout.mapping.read_member(memory, mapping, "host")
    blkbits = layout.inode.read_member(memory, inode, "i_blkbits")
    flags = layout.inode.read_member(memory, inode, "i_flags")
    return File(mapping, blkbits, bool(flags & S_DAX))
