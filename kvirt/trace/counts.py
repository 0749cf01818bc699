# SPDX-License-Identifier: GPL-2.0-only
"""What ``kvirt trace`` counts, as plain numbers. ``None`` stands for what is not known, never 0 for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Tally = Mapping[str, int]

# What the programs count, in the order of the indexes that they are compiled with.
WALKS = ("all_hit", "mixed", "all_fallback", "empty", "file", "ksm")
"""Walks of rmap_walk(). Anonymous folios: all of the VMAs it came to were hits, some, none, or there were
no VMAs. Folios of files and of KSM are found without the fast path."""
STEPS = ("hit", "fallback", "file", "ksm")
"""A folio in one VMA that a walk came to."""
RMAP_REASONS = (
    "temp_stack",
    "stack_displaced",
    "file_private_legacy",
    "devzero",
    "faulted_displaced_shared",
    "faulted_displaced_exclusive",
)
"""Why a step is a fallback; the first that holds."""
RMAP_LABELS = ("alias", "shared")
"""Of fallbacks: the lookup would find the very VMA all the same; of all steps: the folio came by fork."""
COPY_VMA = ("hit", "fallback", "noncow", "failed")
COPY_VMA_REASONS = (
    "unfaulted_reindexed",
    "faulted_homecoming",
    "faulted_displaced_shared",
    "faulted_displaced_exclusive",
    "legacy_file",
)
"""What a copied VMA that can have anonymous folios was, of hits and fallbacks together."""
COPY_VMA_RESULTS = ("new", "merged", "self_merged")
SPLIT_VMA = ("hit", "fallback", "noncow", "failed")
ASSERTIONS = ("COPY-AP", "SPLIT-AP", "RMAP-ADDRESS", "NEW-INDEX")


@dataclass(frozen=True)
class RmapCounts:
    """Walks of rmap_walk() and rmap_walk_locked(), and their steps."""

    walks: Mapping[str, int | None]
    """By :data:`WALKS`. Under a filter nothing tells whose an empty walk is: None."""
    steps: Tally
    """By :data:`STEPS`."""
    reasons: Tally
    """By :data:`RMAP_REASONS`; adds up to the steps that are fallbacks."""
    labels: Tally
    """By :data:`RMAP_LABELS`."""
    callbacks: Mapping[str, Tally | None]
    """By the name of the rmap_one() function, then by :data:`STEPS`; None where it could not be probed."""
    vmas: Tally
    """Walks of anonymous folios by the number of VMAs they came to: "1", "2", "3-4", "5-8", ..."""


@dataclass(frozen=True)
class CopyVmaCounts:
    """Calls of copy_vma()."""

    calls: Tally
    """By :data:`COPY_VMA`."""
    reasons: Tally
    """By :data:`COPY_VMA_REASONS`; adds up to the calls that are hits or fallbacks."""
    results: Tally
    """By :data:`COPY_VMA_RESULTS`; adds up to the calls that did not fail."""


@dataclass(frozen=True)
class SplitVmaCounts:
    """Calls of __split_vma(): of VMAs in place (hit), displaced (fallback), or of shared ones."""

    calls: Tally
    """By :data:`SPLIT_VMA`."""
    errors: Tally
    """By the name of the errno; adds up to the calls that failed."""


@dataclass(frozen=True)
class ProcessCounts:
    """What one process had of it: the process that owns the address space of the VMA."""

    pid: int
    comm: str
    rmap: Tally
    """hit, fallback."""
    copy_vma: Tally
    """hit, fallback."""
    split_vma: Tally
    """hit, fallback."""

    @property
    def fallbacks(self) -> int:
        """Fallbacks of all kinds."""
        return sum(tally.get("fallback", 0) for tally in (self.rmap, self.copy_vma, self.split_vma))


@dataclass(frozen=True)
class Displacer:
    """A place in a program from which VMAs were displaced."""

    pid: int
    comm: str
    vmas: int
    """VMAs that copy_vma() displaced from there."""
    rmap_fallbacks: int
    """Steps of rmap walks that fell back on them, on their parts, or on their copies in children."""
    user: tuple[str, ...]
    kernel: tuple[str, ...]


@dataclass(frozen=True)
class Violation:
    """An assertion that did not hold."""

    id: str
    """One of :data:`ASSERTIONS`."""
    pid: int
    tid: int
    comm: str
    """Of the thread in which it happened."""
    start: int
    end: int
    """The VMA, in bytes."""
    address: int
    expected: int
    actual: int
    """Page offsets; of RMAP-ADDRESS addresses."""
    stack: tuple[str, ...]
    """The kernel's functions, the innermost first."""


@dataclass(frozen=True)
class AssertionCounts:
    """How often an assertion was put to the test."""

    ok: int
    bad: int


@dataclass(frozen=True)
class Counts:
    """All that was counted in some time. What was not asked for, or has no probe, is None."""

    seconds: float
    probes: Mapping[str, str]
    """By function: "attached", or "absent: " and a sentence."""
    rmap: RmapCounts | None = None
    copy_vma: CopyVmaCounts | None = None
    split_vma: SplitVmaCounts | None = None
    assertions: Mapping[str, AssertionCounts | None] = field(default_factory=dict)
    lost: Tally = field(default_factory=dict)
    """What could not be counted, by the reason; empty if nothing was lost."""
    processes: tuple[ProcessCounts, ...] = ()
    """Those with most fallbacks first."""
    displacers: tuple[Displacer, ...] = ()
    violations: tuple[Violation, ...] = ()
    violations_untold: int = 0
    """Violations that were counted, but of which the details were lost."""

    @property
    def bad(self) -> int:
        """Assertions that did not hold."""
        return sum(one.bad for one in self.assertions.values() if one is not None)


def hit_rate(tally: Tally) -> float | None:
    """Return the share of hits among hits and fallbacks, None if there was neither."""
    total = tally["hit"] + tally["fallback"]
    return tally["hit"] / total if total else None
