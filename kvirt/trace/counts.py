# SPDX-License-Identifier: GPL-2.0-only
"""What ``kvirt trace`` counts, as plain numbers. ``None`` stands for what is not known, never 0 for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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
    """Walks of rmap_walk() and its like, and their steps."""

    walks: Mapping[str, int | None]
    """By :data:`WALKS`. Under a filter nothing tells whose an empty walk is: None. So are those of
    which the function could not be probed."""
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

    pid: int | None
    """None for address spaces that nobody owns any more: their last process is exiting."""
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
    pid: int | None
    """Of the process that owns the VMA, if anybody does."""
    tid: int
    """Of the thread in which it happened, which may be another process's."""
    comm: str
    """Of that process."""
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


def since(earlier: Counts, later: Counts) -> Counts:
    """Return what was counted between two counts of one session.

    What is unknown in either is unknown. Processes and places in which nothing was counted are left out,
    the others ranked anew.
    """
    return replace(
        later,
        seconds=later.seconds - earlier.seconds,
        rmap=_rmap_since(earlier.rmap, later.rmap),
        copy_vma=_copy_vma_since(earlier.copy_vma, later.copy_vma),
        split_vma=_split_vma_since(earlier.split_vma, later.split_vma),
        assertions={
            id_: _assertion_since(earlier.assertions.get(id_), one) for id_, one in later.assertions.items()
        },
        lost=_some(_tally_since(earlier.lost, later.lost)),
        processes=_processes_since(earlier.processes, later.processes),
        displacers=_displacers_since(earlier.displacers, later.displacers),
        violations=later.violations[len(earlier.violations) :],
        violations_untold=later.violations_untold - earlier.violations_untold,
    )


def _tally_since(earlier: Tally, later: Tally) -> Tally:
    return {name: number - earlier.get(name, 0) for name, number in later.items()}


def _some(tally: Tally) -> Tally:
    """Without what did not happen: for names that come up when they are first counted."""
    return {name: number for name, number in tally.items() if number}


def _number_since(earlier: int | None, later: int | None) -> int | None:
    return None if earlier is None or later is None else later - earlier


def _rmap_since(earlier: RmapCounts | None, later: RmapCounts | None) -> RmapCounts | None:
    if earlier is None or later is None:
        return None
    return RmapCounts(
        walks={name: _number_since(earlier.walks[name], number) for name, number in later.walks.items()},
        steps=_tally_since(earlier.steps, later.steps),
        reasons=_tally_since(earlier.reasons, later.reasons),
        labels=_tally_since(earlier.labels, later.labels),
        callbacks={
            name: None if tally is None else _tally_since(earlier.callbacks.get(name) or {}, tally)
            for name, tally in later.callbacks.items()
        },
        vmas=_some(_tally_since(earlier.vmas, later.vmas)),
    )


def _copy_vma_since(earlier: CopyVmaCounts | None, later: CopyVmaCounts | None) -> CopyVmaCounts | None:
    if earlier is None or later is None:
        return None
    return CopyVmaCounts(
        calls=_tally_since(earlier.calls, later.calls),
        reasons=_tally_since(earlier.reasons, later.reasons),
        results=_tally_since(earlier.results, later.results),
    )


def _split_vma_since(earlier: SplitVmaCounts | None, later: SplitVmaCounts | None) -> SplitVmaCounts | None:
    if earlier is None or later is None:
        return None
    return SplitVmaCounts(
        calls=_tally_since(earlier.calls, later.calls),
        errors=_some(_tally_since(earlier.errors, later.errors)),
    )


def _assertion_since(
    earlier: AssertionCounts | None, later: AssertionCounts | None
) -> AssertionCounts | None:
    if earlier is None or later is None:
        return None
    return AssertionCounts(later.ok - earlier.ok, later.bad - earlier.bad)


def _processes_since(
    earlier: Sequence[ProcessCounts], later: Sequence[ProcessCounts]
) -> tuple[ProcessCounts, ...]:
    # By the PID alone, as the programs count: exec gives a process another name.
    before = {one.pid: one for one in earlier}
    out = []
    for one in later:
        if (old := before.get(one.pid)) is not None:
            one = replace(
                one,
                rmap=_tally_since(old.rmap, one.rmap),
                copy_vma=_tally_since(old.copy_vma, one.copy_vma),
                split_vma=_tally_since(old.split_vma, one.split_vma),
            )
        if any(any(tally.values()) for tally in (one.rmap, one.copy_vma, one.split_vma)):
            out.append(one)
    return tuple(sorted(out, key=lambda one: (-one.fallbacks, one.pid or 0)))


def _displacers_since(earlier: Sequence[Displacer], later: Sequence[Displacer]) -> tuple[Displacer, ...]:
    before = {(one.pid, one.comm, one.user, one.kernel): one for one in earlier}
    out = []
    for one in later:
        if (old := before.get((one.pid, one.comm, one.user, one.kernel))) is not None:
            one = replace(
                one, vmas=one.vmas - old.vmas, rmap_fallbacks=one.rmap_fallbacks - old.rmap_fallbacks
            )
        if one.vmas or one.rmap_fallbacks:
            out.append(one)
    return tuple(sorted(out, key=lambda one: (-one.rmap_fallbacks, -one.vmas, one.pid)))
