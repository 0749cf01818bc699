# SPDX-License-Identifier: GPL-2.0-only
"""What a kernel starts with that cannot mount the guest's root by itself, as Debian's 6.1.

It has the modules for virtiofs, and a static busybox that loads them and goes on in the root.
"""

from __future__ import annotations

import lzma
import shutil
import stat
from pathlib import Path

from kvirt.errors import KvirtError
from kvirt.lab import apt
from kvirt.lab.cache import built
from kvirt.lab.progress import Report

SUITE, PACKAGE = "trixie", "busybox-static"
NEEDED = ("virtio_pci", "virtiofs")
INIT = """\
#!/bin/busybox sh
for module in /modules/*; do
	/bin/busybox insmod "$module"
done
/bin/busybox mount -t virtiofs -o ro kvirt-root /root &&
	exec /bin/busybox switch_root /root /usr/sbin/kvirt-init
echo "kvirt: the root could not be mounted"
"""


def is_needed(modules: Path) -> bool:
    """Say whether a kernel has virtiofs as a module."""
    return any((modules / "kernel" / "fs" / "fuse").glob("virtiofs.ko*"))


def in_order(dependencies: str) -> list[str]:
    """Return the paths of the needed modules, each behind those that it depends on.

    :param dependencies: depmod's ``modules.dep``
    """
    needs = {}
    for line in dependencies.splitlines():
        path, _, others = line.partition(":")
        needs[Path(path).name.partition(".")[0]] = [*reversed(others.split()), path]
    order: dict[str, None] = {}
    for name in NEEDED:
        # What is built in is in no such line.
        order.update(dict.fromkeys(needs.get(name, [])))
    return list(order)


def entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """Return one file of a cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    path = name.encode() + b"\0"
    numbers = [0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0]
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def archive(busybox: bytes, modules: list[tuple[str, bytes]]) -> bytes:
    """Return the archive: modules are loaded in their order here."""
    files = [entry(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", "modules", "root")]
    files.append(entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    files.append(entry("bin/busybox", stat.S_IFREG | 0o755, busybox))
    files.append(entry("init", stat.S_IFREG | 0o755, INIT.encode()))
    files += [
        entry(f"modules/{number:02}-{name}", stat.S_IFREG | 0o644, data)
        for number, (name, data) in enumerate(modules)
    ]
    return b"".join([*files, entry("TRAILER!!!", 0)])


def module(path: Path) -> bytes:
    """Return the contents of a module's file, whose name says how it is compressed."""
    if path.suffix == ".ko":
        return path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    raise KvirtError(f"{path.name} is compressed in a way that kvirt does not know: name another kernel.")


def build(modules: Path, target: Path, report: Report) -> None:
    """Write the archive for a kernel.

    :param modules: its ``/lib/modules/RELEASE``, with depmod's files
    """
    suite = apt.Suite(SUITE)
    if PACKAGE not in suite.names(PACKAGE):
        suite.update()
    with built(target.with_name("initramfs")) as scratch:
        apt.unpack(suite.download(PACKAGE, scratch / "download", report, "initramfs"), scratch / "files")
        found = [path for path in (scratch / "files").rglob("busybox") if path.parent.name == "bin"]
        if not found:
            raise KvirtError(
                f"Debian's {PACKAGE} has no busybox: report this, with the version of the package."
            )
        paths = [modules / path for path in in_order((modules / "modules.dep").read_text())]
        loaded = [(path.name.partition(".")[0] + ".ko", module(path)) for path in paths]
        partial = scratch / target.name
        partial.write_bytes(archive(found[0].read_bytes(), loaded))
        partial.rename(target)
    shutil.rmtree(target.with_name("initramfs"))
