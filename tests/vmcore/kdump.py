# SPDX-License-Identifier: GPL-2.0-only
"""Dumps in other formats: by makedumpfile from the lab's root, and one that Debian's cannot write."""

import struct
import subprocess
import zlib

from kvirt.lab import capture
from kvirt.lab.root import get_root

PAGE = 4096
# makedumpfile, diskdump_mod.h: where struct disk_dump_header has its sizes, struct page_desc, and its flags.
SIZES_AT = 428
DESCRIPTOR = struct.Struct("<qIIQ")
ZLIB, SNAPPY = 1, 4
# Snappy's elements: a literal with a length of two bytes, and copies of 64 bytes from one byte before.
LITERAL = 61 << 2
COPY_64 = struct.pack("<BH", 63 << 2 | 2, 1)


def makedumpfile(*arguments, stdin=None):
    """Run the program of the root with the root's libraries."""
    root = get_root(extra=capture.PACKAGES)
    libraries = root / "usr/lib/x86_64-linux-gnu"
    argv = [root / "lib64/ld-linux-x86-64.so.2", "--library-path", libraries, root / "usr/bin/makedumpfile"]
    done = subprocess.run([*argv, *arguments], stdin=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def reassemble(flattened, path):
    """What QEMU writes into a pipe, as a file that can be read from anywhere."""
    with flattened.open("rb") as file:
        makedumpfile("-R", path, stdin=file)


def for_makedumpfile(core, path):
    """Copy QEMU's ELF core with its program headers where makedumpfile looks for them: behind the header."""
    subprocess.run(["cp", "--sparse=always", core, path], check=True)
    with path.open("r+b") as file:
        header = bytearray(file.read(64))
        (offset,) = struct.unpack_from("<Q", header, 32)
        (count,) = struct.unpack_from("<H", header, 56)
        file.seek(offset)
        headers = file.read(56 * count)
        struct.pack_into("<QQ", header, 32, 64, 0)
        # QEMU 7.2 is wrong about the size of the header; there are no sections any more.
        struct.pack_into("<HHHHHH", header, 52, 64, 56, count, 64, 0, 0)
        file.seek(0)
        file.write(header + headers)


def snappy(page):
    """A page with zeros at its end as snappy writes it; None if it would not become smaller so."""
    length = len(page.rstrip(b"\0")) + 1
    copies, rest = divmod(PAGE - length, 64)
    if rest:
        length += rest
    if length + 3 * copies + 8 >= PAGE:
        return None
    literal = struct.pack("<BH", LITERAL, length - 1) + page[:length].ljust(length, b"\0")
    # The size of the whole, seven bits a byte.
    return b"\x80\x20" + literal + COPY_64 * copies


def to_snappy(kdump, path):
    """Write a kdump of zlib's pages anew, with those compressed by snappy where that is easy.

    :returns: how many are
    """
    data = kdump.read_bytes()
    block, sub_blocks, bitmap_blocks = struct.unpack_from("<iii", data, SIZES_AT)
    bitmap = (1 + sub_blocks) * block
    first = bitmap + bitmap_blocks * block
    half = bitmap_blocks * block // 2
    number = int.from_bytes(data[bitmap + half : first], "little").bit_count()
    descriptors, pages, at = bytearray(), bytearray(), first + number * DESCRIPTOR.size
    written = {}
    for descriptor in DESCRIPTOR.iter_unpack(data[first:at]):
        offset, size, flags, page_flags = descriptor
        # Pages of zeros are there once.
        if offset not in written:
            held = data[offset : offset + size]
            better = snappy(zlib.decompress(held) if flags & ZLIB else held)
            if better is not None:
                held, flags = better, SNAPPY
            written[offset] = at + len(pages), len(held), flags
            pages += held
        descriptors += DESCRIPTOR.pack(*written[offset], page_flags)
    path.write_bytes(data[:first] + descriptors + pages)
    return sum(flags == SNAPPY for _, _, flags in written.values())
