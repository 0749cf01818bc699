# SPDX-License-Identifier: GPL-2.0-only
"""Dumps are copied byte by byte, and take no space where they are zero."""

import os
import threading

import pytest

from kvirt.lab.vmcore import BLOCK, CHUNK, copy_sparse

CONTENTS = {
    "empty": b"",
    "short": b"abc",
    "zeros at the end": b"abc" + bytes(3 * CHUNK),
    "one byte in the middle": bytes(CHUNK + 5) + b"x" + bytes(CHUNK),
    "no zeros": b"x" * (2 * CHUNK + 17),
    "zeros alone, of odd size": bytes(CHUNK + 7),
}


@pytest.mark.parametrize("data", CONTENTS.values(), ids=CONTENTS.keys())
def test_copy(tmp_path, data):
    ours, theirs = os.pipe()
    writer = threading.Thread(target=feed, args=(theirs, data))
    writer.start()
    path = tmp_path / "copy"
    with os.fdopen(ours, "rb", buffering=0) as source, path.open("wb") as target:
        assert copy_sparse(source, target) == len(data)
    writer.join()
    assert path.read_bytes() == data
    allocated = sum(any(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)) * BLOCK
    assert path.stat().st_blocks * 512 <= allocated + BLOCK


def feed(pipe, data):
    with os.fdopen(pipe, "wb", buffering=0) as file:
        # In pieces of odd size, as a pipe may give them.
        for start in range(0, len(data), 12345):
            file.write(data[start : start + 12345])
