# SPDX-License-Identifier: GPL-2.0-only
"""What is in the archive, as cpio itself reads it; that kernels start with it is tried by the matrix."""

import lzma

import pytest

from kvirt.errors import KvirtError
from kvirt.lab import initramfs

DEPENDENCIES = """\
kernel/fs/fuse/fuse.ko:
kernel/fs/fuse/virtiofs.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko \
kernel/fs/fuse/fuse.ko
kernel/drivers/virtio/virtio.ko:
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
"""


def test_modules_come_behind_those_they_need():
    order = [path.rpartition("/")[2] for path in initramfs.in_order(DEPENDENCIES)]
    assert sorted(order) == ["fuse.ko", "virtio.ko", "virtio_pci.ko", "virtio_ring.ko", "virtiofs.ko"]
    for line in DEPENDENCIES.splitlines():
        path, _, needs = line.partition(":")
        for need in needs.split():
            assert order.index(need.rpartition("/")[2]) < order.index(path.rpartition("/")[2])


def test_what_is_built_in_is_left_out():
    assert initramfs.in_order("kernel/fs/fuse/virtiofs.ko: kernel/fs/fuse/fuse.ko\n") == [
        "kernel/fs/fuse/fuse.ko",
        "kernel/fs/fuse/virtiofs.ko",
    ]


def unpack(data):
    """Mode and contents by name, as the kernel's init/initramfs.c reads them."""
    files, at = {}, 0
    while True:
        assert data[at : at + 6] == b"070701" and at % 4 == 0
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size]
        assert name[-1:] == b"\0"
        body = (at + 110 + name_size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            return files
        files[name[:-1].decode()] = (mode, data[body : body + size], tuple(fields[9:11]))
        at = (body + size + 3) // 4 * 4


def test_the_archive_is_one():
    data = initramfs.archive(b"\x7fELF busybox", [("virtio.ko", b"one"), ("virtiofs.ko", b"three")])
    files = unpack(data)
    assert files["bin/busybox"][1] == b"\x7fELF busybox"
    assert files["init"] == (0o100755, initramfs.INIT.encode(), (0, 0))
    assert files["dev/console"][::2] == (0o020600, (5, 1))
    modules = {name: content for name, (_, content, _) in files.items() if name.startswith("modules/")}
    assert modules == {"modules/00-virtio.ko": b"one", "modules/01-virtiofs.ko": b"three"}
    # What they are in has to come before them.
    assert list(files).index("modules") < list(files).index("modules/00-virtio.ko")


def test_kernels_that_need_one(tmp_path):
    assert not initramfs.is_needed(tmp_path)
    fuse = tmp_path / "kernel/fs/fuse"
    fuse.mkdir(parents=True)
    (fuse / "fuse.ko").touch()
    assert not initramfs.is_needed(tmp_path)
    (fuse / "virtiofs.ko.xz").touch()
    assert initramfs.is_needed(tmp_path)


def test_compressed_modules(tmp_path):
    path = tmp_path / "virtio.ko.xz"
    path.write_bytes(lzma.compress(b"module"))
    assert initramfs.module(path) == b"module"
    with pytest.raises(KvirtError, match="compressed in a way"):
        initramfs.module(tmp_path / "virtio.ko.zst")
