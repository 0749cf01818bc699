# SPDX-License-Identifier: GPL-2.0-only
"""The C program that one request needs: the files of bpf/, and the constants they are compiled with."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvirt.errors import KvirtError
from kvirt.trace import counts
from kvirt.trace.filters import Cgroup, Glob

if TYPE_CHECKING:
    from kvirt.layout_trace import TraceLayout

# In a source tree, and where an installation puts it.
DIRECTORIES = (Path(__file__).parents[2] / "bpf", Path(sys.prefix) / "share" / "kvirt" / "bpf")
# 1, 2, up to 4, ... up to 16384 VMAs, and more.
VMAS_BUCKETS = 16
NEW_ANONS = ("folio_add_new_anon_rmap", "hugetlb_add_new_anon_rmap")
RMAP_WALKS = {
    "rmap_walk_anon": ("all_hit", "mixed", "all_fallback", "empty"),
    "rmap_walk_ksm": ("ksm",),
    "__rmap_walk_file": ("file",),
    "rmap_walk_file": ("file",),
}
"""By function, the walks that its probe tells of. Of the last two a kernel has one, or one that calls the
other."""
# Processes that are told apart.
PROCESSES = 16384
# Violations of one assertion that each CPU tells the details of.
VIOLATIONS = 250
PROCESS_COUNTERS = ("rmap_hit", "rmap_fallback", "copy_hit", "copy_fallback", "split_hit", "split_fallback")
LOST = {
    "walks": "rmap walks for which there was no room",
    "steps": "steps of a walk by a function without a name",
    "copy_vma": "calls of copy_vma() of which the return was not seen",
    "split_vma": "calls of __split_vma() of which the return was not seen",
    "new_index": "new anonymous folios of which the index was not seen",
    "processes": f"hits and fallbacks of processes beyond the first {PROCESSES}",
    "stacks": "stacks of displaced VMAs for which there was no room",
    "family": "descendants of the command for which there was no room",
    "dispatch": "calls for which the kernel did not find the program",
    "violations": "details of violations for which there was no room",
}
"""What may be lost, and the words for it."""


@dataclass(frozen=True)
class Request:
    """What to trace, and whose."""

    rmap: bool = True
    copy_vma: bool = True
    split_vma: bool = True
    pid: int | None = None
    """A process (thread group): only VMAs of its address space count."""
    comm: Glob | None = None
    cgroup: Cgroup | None = None
    family: bool = False
    """Processes that are named later, and their descendants."""
    stacks: bool = False

    @property
    def filtered(self) -> bool:
        """Whether it is about some processes only."""
        return self.family or any(one is not None for one in (self.pid, self.comm, self.cgroup))


class Indexes:
    """Where each number is in the programs' array of counters."""

    def __init__(self, callbacks: int) -> None:
        """Lay out the array.

        :param callbacks: how many rmap_one() functions there are
        """
        self._size = 0
        self.walks = self._take(counts.WALKS)
        self.reasons = self._take(counts.RMAP_REASONS)
        self.labels = self._take(counts.RMAP_LABELS)
        self.copy_vma = self._take(counts.COPY_VMA)
        self.copy_vma_reasons = self._take(counts.COPY_VMA_REASONS)
        self.copy_vma_results = self._take(counts.COPY_VMA_RESULTS)
        self.split_vma = self._take(counts.SPLIT_VMA)
        self.ok = self._take(counts.ASSERTIONS)
        self.bad = self._take(counts.ASSERTIONS)
        self.vmas = self._take(vmas_names())
        self.lost = self._take(tuple(LOST))
        self.steps = [self._take(counts.STEPS) for _ in range(callbacks)]
        # A power of two, for the verifier's sake.
        self.size = 1 << (self._size - 1).bit_length()

    def _take(self, names: tuple[str, ...]) -> dict[str, int]:
        first = self._size
        self._size += len(names)
        return {name: first + i for i, name in enumerate(names)}

    def constants(self) -> Iterator[tuple[str, int]]:
        """Yield the constants that stand for the indexes in the programs."""
        groups = {
            "WALK": self.walks,
            "RMAP": self.reasons,
            "LABEL": self.labels,
            "COPY": {**self.copy_vma, **self.copy_vma_reasons, **self.copy_vma_results},
            "SPLIT": self.split_vma,
            "LOST": self.lost,
            "STEP": {name: i for i, name in enumerate(counts.STEPS)},
            "PROCESS": {name: i for i, name in enumerate(PROCESS_COUNTERS)},
        }
        for prefix, group in groups.items():
            for name, index in group.items():
                yield f"KV_{prefix}_{name.upper()}", index
        for i, name in enumerate(counts.ASSERTIONS):
            yield f"KV_{name.replace('-', '_')}", i
        yield "KV_OK", self.ok[counts.ASSERTIONS[0]]
        yield "KV_BAD", self.bad[counts.ASSERTIONS[0]]
        yield "KV_VMAS", self.vmas["1"]
        yield "KV_VMAS_BUCKETS", VMAS_BUCKETS
        yield "KV_STEP", self.lost[next(reversed(LOST))] + 1
        yield "KV_STEPS", len(counts.STEPS)
        yield "KV_COUNTERS", self.size
        yield "KV_PROCESS_COUNTERS", len(PROCESS_COUNTERS)
        yield "KV_PROCESSES", PROCESSES
        yield "KV_VIOLATIONS", VIOLATIONS


def vmas_names() -> tuple[str, ...]:
    """Name the buckets of walks by their number of VMAs: "1", "2", "3-4", "5-8", ..."""
    names = ["1", "2"]
    names += [f"{2 ** (i - 1) + 1}-{2**i}" for i in range(2, VMAS_BUCKETS - 1)]
    return (*names, f"{2 ** (VMAS_BUCKETS - 2) + 1}-")


def constants(request: Request, layout: TraceLayout) -> dict[str, int]:
    """Return what the programs are compiled with: offsets, positions of arguments, indexes, the filter."""
    defined = dict(layout.constants)
    defined["KV_PAGE_SHIFT"] = os.sysconf("SC_PAGESIZE").bit_length() - 1
    for function, roles in layout.arguments.items():
        name = function.lstrip("_").upper()
        for role, position in roles.items():
            defined[f"KV_ARG_{name}_{role.upper()}"] = position
    defined |= Indexes(len(layout.callbacks)).constants()
    if request.filtered:
        defined["KV_FILTER"] = 1
    if request.pid is not None:
        defined["KV_FILTER_PID"] = request.pid
    if request.comm is not None:
        defined["KV_FILTER_COMM"] = 1
        defined["KV_GLOB_START"] = request.comm.start
        defined["KV_GLOB_STARS"] = request.comm.stars
        defined["KV_GLOB_ACCEPT"] = request.comm.accept
    if request.cgroup is not None:
        defined["KV_FILTER_CGROUP"] = request.cgroup.id
        defined["KV_FILTER_CGROUP_LEVEL"] = request.cgroup.level
    if request.family:
        defined["KV_FILTER_FAMILY"] = 1
    if request.stacks:
        defined["KV_STACKS"] = 1
    return defined


def files(request: Request, layout: TraceLayout) -> list[str]:
    """Name the files that a request is compiled from; those of functions that cannot be probed are not."""
    names = ["kvirt.h"]
    if request.rmap and any(name in layout.arguments for name in RMAP_WALKS):
        names += ["rmap_walk.c", "rmap_one.c"]
    if request.rmap and any(name in layout.arguments for name in NEW_ANONS):
        names.append("new_anon_rmap.c")
    if request.copy_vma and "copy_vma" in layout.arguments:
        names.append("copy_vma.c")
    if request.split_vma and "__split_vma" in layout.arguments:
        names.append("split_vma.c")
    if request.split_vma and "vma_complete" in layout.arguments:
        names.append("vma_complete.c")
    if request.family:
        names.append("family.c")
    if layout.fprobe:
        names.append("dispatch.c")
    return names


def text(request: Request, layout: TraceLayout) -> str:
    """Return the program without its constants."""
    directory = next((path for path in DIRECTORIES if path.is_dir()), None)
    if directory is None:
        raise KvirtError(
            f"The programs of kvirt trace are neither in {DIRECTORIES[0]} nor in {DIRECTORIES[1]}: install "
            "kvirt again."
        )
    return "\n".join((directory / name).read_text() for name in files(request, layout))


def source(request: Request, layout: TraceLayout) -> str:
    """Return the program as one file that needs nothing else, for people to read."""
    defined = constants(request, layout)
    lines = [f"#define {name} {literal(value)}" for name, value in sorted(defined.items())]
    return "\n".join(lines) + "\n\n" + text(request, layout)


def literal(value: int) -> str:
    """Write a number as C reads it."""
    return str(value) if -(2**31) <= value < 2**31 else f"{value:#x}ULL"
