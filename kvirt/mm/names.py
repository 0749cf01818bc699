# SPDX-License-Identifier: GPL-2.0-only
"""Names of VMAs as ``/proc/PID/maps`` shows them.

drgn's helpers read each member on its own, and follow damaged or torn parents for ever. Here every walk has
an end, and what leads nowhere makes the name "?": a name is a courtesy, and must not stop a check.
"""

from __future__ import annotations

from collections.abc import Callable

import drgn

from kvirt.layout import Layout, PathLayout
from kvirt.mm.vma import Vma
from kvirt.snapshot import Readable, Table

# Directories deep, mounts included. PATH_MAX allows fewer.
_DEPTH_MAX = 4096
# Bytes of one name, be it of a directory or of a mapping. PATH_MAX too; most have NAME_MAX at most.
_NAME_MAX = 4096
# What is read at once of a string that ends with a NUL.
_PIECE = 64

_UNKNOWN = "?"


def read_string(memory: Readable, address: int) -> bytes:
    """Read a string that ends with a NUL.

    :raises drgn.FaultError: if it cannot be read
    :raises ValueError: if it does not end
    """
    text = b""
    while len(text) < _NAME_MAX:
        at = address + len(text)
        piece, end, _ = memory.read(at, _PIECE - at % _PIECE).partition(b"\0")
        text += piece
        if end:
            return text
    raise ValueError("a string without an end")


class Paths:
    """Paths of files (fs/d_path.c: d_path()); what is above several of them is found once."""

    def __init__(self, memory: Readable, layout: PathLayout, dname: Callable[[int], str | None]) -> None:
        """Prepare.

        :param dname: tells a function by its address, as :func:`kvirt.layout.dname_function` does
        """
        self._memory = memory
        self._dname = dname
        self._layout = layout
        dentry, mount, operations = layout.dentry, layout.mount, layout.operations
        get_dentry = dentry.getter(("d_parent", "pprev", "d_op", "name", "len", "d_inode"))
        get_mount = mount.getter(("mnt_root", "mnt_parent", "mnt_mountpoint"))
        self._file = layout.file.getter(("dentry", "mnt"))
        self._dentries = Table(lambda at: get_dentry(memory.read(at, dentry.size)))
        self._mounts = Table(lambda at: get_mount(memory.read(at, mount.size)))
        self._d_dname = Table(lambda at: operations.read_member(memory, at, "d_dname"))
        self._directories: dict[tuple[int, int], bytes] = {}

    def d_path(self, file: int) -> bytes:
        """Path of a file as ``/proc/PID/maps`` shows it.

        :param file: address of the ``struct file``
        :raises drgn.FaultError: if a part of it cannot be read
        :raises OverflowError: if it leads to where no address is
        :raises ValueError: if it has no end, or is made up in a way that is not known
        """
        dentry, mnt = self._file(self._memory.read(file, self._layout.file.size))
        mount = mnt - self._layout.mount.offset("mnt")
        mnt_root = self._mounts[mount][0]
        d_parent, pprev, d_op, *_ = self._dentries[dentry]
        d_dname = self._d_dname[d_op] if d_op else 0
        if d_dname and not dentry == d_parent == mnt_root:
            return self._made_up(dentry, d_dname)
        if dentry in (mnt_root, d_parent):
            path = self._directory(dentry, mount) or b"/"
        else:
            path = self._directory(d_parent, mount) + b"/" + self._name(dentry)
        # d_unlinked(), include/linux/dcache.h
        return path + b" (deleted)" if not pprev and dentry != d_parent else path

    def _made_up(self, dentry: int, d_dname: int) -> bytes:
        """Name of a file that no directory has."""
        function = self._dname(d_dname)
        if function == "simple_dname":
            # memfds, shared memory and the like
            return b"/" + self._name(dentry) + b" (deleted)"
        if function == "anon_inodefs_dname":
            # Rings of io_uring and of perf, maps of BPF and the like
            return b"anon_inode:" + self._name(dentry)
        if function == "sockfs_dname":
            # Rings of packet sockets and the like
            *_, inode = self._dentries[dentry]
            return b"socket:[%d]" % self._layout.inode.read_member(self._memory, inode, "i_ino")
        raise ValueError("a name made up in a way that is not known")

    def _name(self, dentry: int) -> bytes:
        *_, name, length, _ = self._dentries[dentry]
        if length > _NAME_MAX:
            raise ValueError("a name longer than any")
        text = self._memory.read(name, length)
        if 0 in text:
            raise ValueError("a name that is torn")
        return text

    def _directory(self, dentry: int, mount: int) -> bytes:
        """Path of a directory, with a slash before each name; that of the root is empty."""
        place = dentry, mount
        path = self._directories.get(place)
        if path is None:
            path = self._directories[place] = self._walk(dentry, mount)
        return path

    def _walk(self, dentry: int, mount: int) -> bytes:
        # __prepend_path()
        names: list[bytes] = []
        for _ in range(_DEPTH_MAX):
            mnt_root, mnt_parent, mnt_mountpoint = self._mounts[mount]
            d_parent = self._dentries[dentry][0]
            if dentry in (mnt_root, d_parent):
                if mount == mnt_parent or dentry != mnt_root:
                    return b"".join(reversed(names))
                dentry, mount = mnt_mountpoint, mnt_parent
            else:
                names.append(b"/" + self._name(dentry))
                dentry = d_parent
        raise ValueError("a path without a root")


class VmaNames:
    """Names of the VMAs of one process; a file's path is found once."""

    def __init__(
        self,
        memory: Readable,
        layout: Layout,
        dname: Callable[[int], str | None],
        start_stack: int,
        start_brk: int,
        brk: int,
    ) -> None:
        """Prepare.

        :param dname: see :class:`Paths`
        """
        self._memory = memory
        self._layout = layout
        self._start_stack = start_stack
        self._heap = (start_brk, brk)
        self._paths = None if layout.path is None else Paths(memory, layout.path, dname)
        self._files: dict[int, str] = {}

    def __call__(self, vma: Vma) -> str:
        """Name of a VMA, "" if it has none, "?" if it cannot be told (fs/proc/task_mmu.c: get_vma_name())."""
        try:
            if vma.vm_file:
                return self._anon_name(vma, "anon_shmem") if vma.anon_name else self._file(vma.vm_file)
            name = self._special(vma) if vma.vm_ops else None
            if name is not None:
                return name
            if vma.vm_start < self._heap[1] and vma.vm_end > self._heap[0]:
                return "[heap]"
            if vma.vm_start <= self._start_stack <= vma.vm_end:
                return "[stack]"
            return self._anon_name(vma, "anon") if vma.anon_name else ""
        except (drgn.FaultError, OverflowError, ValueError):
            return _UNKNOWN

    def _file(self, address: int) -> str:
        name = self._files.get(address)
        if name is None:
            # Also if it fails.
            self._files[address] = _UNKNOWN
            name = _UNKNOWN if self._paths is None else _text(self._paths.d_path(address))
            self._files[address] = name
        return name

    def _special(self, vma: Vma) -> str | None:
        how, memory = self._layout.special_mapping, self._memory
        if how is None:
            return _UNKNOWN
        if how.operations.read_member(memory, vma.vm_ops, "name") != how.function:
            return None
        mapping = how.vma.read_member(memory, vma.address, "vm_private_data")
        return _text(read_string(memory, how.mapping.read_member(memory, mapping, "name")))

    def _anon_name(self, vma: Vma, prefix: str) -> str:
        if self._layout.anon_name is None:
            return _UNKNOWN
        return f"[{prefix}:{_text(read_string(self._memory, vma.anon_name + self._layout.anon_name))}]"


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")
