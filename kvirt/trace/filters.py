# SPDX-License-Identifier: GPL-2.0-only
"""Whose events are counted: processes, names, cgroups."""

from __future__ import annotations

import fnmatch
import os
import re
from dataclasses import dataclass
from pathlib import Path

from kvirt.errors import KvirtError

# include/linux/sched.h: with the NUL at its end.
TASK_COMM_LEN = 16
# include/uapi/linux/nsfs.h: the inode of the namespace that the kernel starts with.
PID_NS_INIT_INO = 0xEFFFFFFC

_PROC = Path("/proc")
# kernfs_create_root() numbers from 1, and the first number is the root's (fs/kernfs/dir.c).
_ROOT_ID = 1


@dataclass(frozen=True)
class Glob:
    """A pattern of ``comm``, made into tables with which a program without loops in the pattern can match.

    The matching is a Shift-And simulation. State j means: what was read is what the first j characters of
    the pattern stand for. Bit j of a word is state j; asterisks are no characters, but states that remain.
    """

    pattern: str
    masks: tuple[int, ...]
    """For each value of a byte, bit j set if the pattern's character j stands for it."""
    stars: int
    """Bit j set if an asterisk stands before character j, or behind the last."""
    start: int
    """The states before the first byte."""
    accept: int
    """The state in which all of the pattern was found."""

    @classmethod
    def compile(cls, pattern: str) -> Glob:
        """Take a pattern as the shell's: ``*``, ``?``, ``[abc]``, ``[a-z]``, ``[!a-z]``.

        :raises KvirtError: if it needs more bytes than a comm has
        """
        text = os.fsencode(pattern)
        tokens: list[bytes] = []
        stars = 0
        # A bracket that is never closed stands for itself; one that closes may come first in its set.
        for token in re.findall(rb"\[!?+\]?+[^\]]*\]|.", text, re.DOTALL):
            if token == b"*":
                stars |= 1 << len(tokens)
            else:
                tokens.append(token)
        if len(tokens) >= TASK_COMM_LEN:
            raise KvirtError(
                f"No process has a name like {pattern}: the kernel keeps {TASK_COMM_LEN - 1} bytes of a name "
                f"(ps -o comm shows them), and this pattern needs {len(tokens)}; end it with an asterisk."
            )
        if any(len(token) > 1 and not token.isascii() for token in tokens):
            raise KvirtError(
                f"The pattern {pattern} has a set with characters of several bytes, and names are compared "
                "byte by byte: put an asterisk in place of the set."
            )
        masks = tuple(
            sum(fnmatch.fnmatchcase(bytes([byte]), token) << j for j, token in enumerate(tokens))
            for byte in range(256)
        )
        return cls(pattern, masks, stars, 1, 1 << len(tokens))

    def matches(self, comm: bytes) -> bool:
        """Whether a comm is like the pattern; the very operations that the BPF program does.

        :param comm: up to 16 bytes, of which those from the first NUL on do not count
        """
        states = self.start
        for byte in comm[:TASK_COMM_LEN]:
            if byte == 0:
                break
            states = ((states & self.masks[byte]) << 1) | (states & self.stars)
        return states & self.accept != 0


@dataclass(frozen=True)
class Cgroup:
    """A cgroup and all below it."""

    path: str
    """As it was given."""
    id: int
    """The id of its ``struct kernfs_node``."""
    level: int
    """Of its ``struct cgroup``: 0 is the root of the hierarchy."""

    @classmethod
    def find(cls, path: str) -> Cgroup:
        """Find a cgroup of the unified hierarchy.

        :param path: of its directory, or from the hierarchy's root on, as in /proc/PID/cgroup behind "0::"
        :raises KvirtError: if there is none, or none that could be found by its id
        """
        mounts = [line.split() for line in (_PROC / "self/mounts").read_text().splitlines()]
        roots = [Path(_unescape(fields[1])) for fields in mounts if fields[2] == "cgroup2"]
        if not roots:
            raise KvirtError(
                f"There is no cgroup {path}, because no cgroup2 file system is mounted: mount it with "
                "'mount -t cgroup2 none /sys/fs/cgroup'."
            )
        for root in roots:
            # What is given may be a path of either kind; ".." must not lead out of the hierarchy.
            for candidate in (root / path, root / path.lstrip("/")):
                directory = candidate.resolve()
                if directory.is_relative_to(root) and (directory / "cgroup.procs").exists():
                    return cls._of(path, root, directory)
        where = " or ".join(str(root) for root in roots)
        raise KvirtError(
            f"There is no cgroup {path} in {where}: name its directory; 'systemd-cgls' or "
            "'cat /proc/PID/cgroup' tells which there are."
        )

    @classmethod
    def _of(cls, path: str, root: Path, directory: Path) -> Cgroup:
        if root.stat().st_ino != _ROOT_ID:
            raise KvirtError(
                f"How deep the cgroup {path} lies cannot be told, because {root} is only a part of the "
                "hierarchy, as in a container: run kvirt outside of it."
            )
        depth = len(directory.relative_to(root).parts)
        return cls(path, directory.stat().st_ino, depth)


def _unescape(word: str) -> str:
    """A word of /proc/PID/mounts: blanks and the like are octal in it (mangle(), fs/seq_file.c)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)


def process(pid: int) -> int:
    """Make sure that a process with an address space has this PID, and return it.

    :raises KvirtError: if there is none, or it is a thread's, or the kernel knows it by another number
    """
    need_first_pid_namespace()
    try:
        status = (_PROC / str(pid) / "status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise KvirtError(f"There is no process with PID {pid}: look for it with ps.") from None
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    if (tgid := int(fields["Tgid"])) != pid:
        raise KvirtError(
            f"PID {pid} ({fields['Name']}) is a thread of the process {tgid}: name that, all of its threads "
            "are traced with it."
        )
    if "VmSize" not in fields:
        raise KvirtError(
            f"PID {pid} ({fields['Name']}) has no address space, being a kernel thread or having exited: "
            "name a user process that runs."
        )
    return pid


def need_first_pid_namespace() -> None:
    """Make sure that PIDs are here what they are for the BPF programs.

    :raises KvirtError: in a PID namespace of its own
    """
    namespace = _PROC / "self/ns/pid"
    if namespace.exists() and namespace.stat().st_ino != PID_NS_INIT_INO:
        raise KvirtError(
            "PIDs mean something else here, in a PID namespace as containers have it: run kvirt outside "
            "of it."
        )
