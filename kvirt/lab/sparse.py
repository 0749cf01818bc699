# SPDX-License-Identifier: GPL-2.0-only
"""Writing a stream to a file whose zeros take no space: most of a guest's memory is untouched."""

from __future__ import annotations

from typing import IO

CHUNK = 1 << 20
# The block that file systems can leave out.
BLOCK = 1 << 12


def copy(source: IO[bytes], target: IO[bytes]) -> int:
    """Copy all of an unbuffered ``source``, with holes for blocks of zeros; return the size."""
    zeros = bytes(CHUNK)
    size = 0
    pending = bytearray(CHUNK)
    view = memoryview(pending)
    while True:
        filled = 0
        while filled < CHUNK and (got := source.readinto(view[filled:])):  # type: ignore[attr-defined]
            filled += got
        if filled == 0:
            break
        if pending[:filled] != zeros[:filled]:
            for start in range(0, filled, BLOCK):
                end = min(start + BLOCK, filled)
                if view[start:end] != zeros[start:end]:
                    target.seek(size + start)
                    target.write(view[start:end])
        size += filled
    target.truncate(size)
    return size
