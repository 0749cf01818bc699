# SPDX-License-Identifier: GPL-2.0-only
"""Many processes with copied pages of private file mappings, under reclaim: a workload to be traced.

Run inside a guest, as root: ``kvirt trace rmap -- python3 -m kvirt.lab.bench.reclaim``. It prints one line
of what it did.

A parent maps libraries and data files as programs do, writes to a part of them, and forks. Each child
writes to another part, some move a mapping elsewhere. Then the kernel is asked for their memory back, all
touch it again, and so on.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvirt.lab.procfs import PAGE_SIZE
from kvirt.lab.workload import syscalls as sc
from kvirt.lab.workload.process import die_with_parent
from kvirt.lab.workload.swaparea import SwapArea

READ_WRITE = sc.PROT_READ | sc.PROT_WRITE
CGROUPS = Path("/sys/fs/cgroup")
LIBRARIES = ("libc.so.6", "libm.so.6", "libcrypto.so.3", "libstdc++.so.6")
LIBRARY_PATH = Path("/usr/lib/x86_64-linux-gnu")
# Pages of a library's data that relocation writes to, and where they begin in its file.
RELOCATED, DATA_AT = 16, 24
DATA_PAGES, DATA_FILES, HEAP_PAGES = 96, 3, 96
# Children that move a mapping after they wrote to it: one in this many.
MOVERS = 8


class Mappings:
    """Writable private mappings, and which pages of each are written when."""

    def __init__(self, directory: Path) -> None:
        """Map libraries and data files, and a heap."""
        self.all: list[tuple[int, int]] = []
        for name in LIBRARIES:
            if (path := LIBRARY_PATH / name).exists():
                self._map(path, DATA_AT, RELOCATED)
        for number in range(DATA_FILES):
            path = directory / f"data{number}"
            path.write_bytes(bytes([number + 1]) * ((DATA_PAGES + 8) * PAGE_SIZE))
            self._map(path, 8, DATA_PAGES)
        heap = sc.mmap(0, HEAP_PAGES * PAGE_SIZE, READ_WRITE, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS)
        self.all.append((heap, HEAP_PAGES))

    def _map(self, path: Path, first: int, pages: int) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        size = pages * PAGE_SIZE
        at = sc.mmap(0, size, READ_WRITE, sc.MAP_PRIVATE, fd, first * PAGE_SIZE)
        os.close(fd)
        self.all.append((at, pages))

    def write(self, one_in: int, first: int) -> None:
        """Write to every so-manieth page of each mapping."""
        for at, pages in self.all:
            for page in range(first, pages, one_in):
                sc.store(at + page * PAGE_SIZE, 8, page + 1)

    def read(self) -> None:
        """Read a word of each page."""
        for at, pages in self.all:
            for page in range(pages):
                sc.load(at + page * PAGE_SIZE)

    def move(self, which: int) -> None:
        """Move a mapping elsewhere, as an allocator that grows does."""
        at, pages = self.all[which]
        size = pages * PAGE_SIZE
        room = sc.mmap(0, size, 0, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_NORESERVE)
        sc.mremap(at, size, size, sc.MREMAP_MAYMOVE | sc.MREMAP_FIXED, room)
        self.all[which] = (room, pages)


class Child:
    """A forked process that touches its memory when it is told to."""

    def __init__(self, mappings: Mappings, number: int) -> None:
        """Fork it."""
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                die_with_parent()
                self._live(mappings, number, orders, answers)
                status = 0
            finally:
                os._exit(status)
        os.close(orders)
        os.close(answers)

    @staticmethod
    def _live(mappings: Mappings, number: int, orders: int, answers: int) -> None:
        mappings.write(4, number % 4)
        if number % MOVERS == 0:
            mappings.move(len(mappings.all) - 2)
        os.write(answers, b".")
        while os.read(orders, 1) == b"t":
            mappings.read()
            os.write(answers, b".")

    def answered(self) -> None:
        """Wait until it has done what it was told."""
        if os.read(self._answers, 1) != b".":
            raise RuntimeError("A process of the workload died: see the guest's console.")

    def touch(self) -> None:
        """Tell it to touch all of its memory."""
        os.write(self._orders, b"t")

    def end(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@contextmanager
def cgroup() -> Iterator[Path]:
    """A cgroup of its own for this process and what it forks, from which memory can be asked back."""
    (CGROUPS / "cgroup.subtree_control").write_text("+memory")
    path = CGROUPS / "kvirt-reclaim"
    path.mkdir()
    (path / "cgroup.procs").write_text("0")
    try:
        yield path
    finally:
        (CGROUPS / "cgroup.procs").write_text("0")
        path.rmdir()


def reclaim(path: Path) -> None:
    """Ask the kernel for all memory of a cgroup."""
    # EAGAIN: it got less than that.
    with suppress(BlockingIOError):
        (path / "memory.reclaim").write_text((path / "memory.current").read_text().strip())


def main() -> None:
    """Run the workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    area = SwapArea()
    children: list[Child] = []
    with tempfile.TemporaryDirectory(prefix="kvirt-reclaim-") as directory:
        try:
            area.open()
            with cgroup() as group:
                mappings = Mappings(Path(directory))
                mappings.write(2, 0)
                try:
                    for number in range(options.processes):
                        children.append(Child(mappings, number))
                        children[-1].answered()
                    for _ in range(options.rounds):
                        reclaim(group)
                        for child in children:
                            child.touch()
                        for child in children:
                            child.answered()
                finally:
                    for child in children:
                        child.end()
        finally:
            area.close()
    print(f"{options.processes} processes, {len(mappings.all)} mappings each, {options.rounds} rounds")


if __name__ == "__main__":
    main()
