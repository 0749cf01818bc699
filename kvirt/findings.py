# SPDX-License-Identifier: GPL-2.0-only
"""What checks say: findings, what they looked at, and the verdict over all of it."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kvirt.limits import MAX_FINDINGS

if TYPE_CHECKING:
    from kvirt.mm.vma import Vma


class Severity(enum.StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """A kernel bug or corrupted memory."""
    WARNING = "warning"
    """Reachable without a kernel bug, but worth a look."""
    INFO = "info"
    """Legal."""
    TRANSIENT = "transient"
    """Looked wrong while somebody was changing it, and did not repeat."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be. What does not apply is None."""

    id: str
    severity: Severity
    message: str
    pid: int | None = None
    vma: tuple[int, int] | None = None
    """Start and end of the VMA."""
    address: int | None = None
    expected: int | None = None
    actual: int | None = None
    pages: int = 1
    """Base pages of this VMA that are wrong in the same way; *address* is the first one's."""


@dataclass(slots=True)
class PageCounts:
    """Base pages of one process."""

    present: int = 0
    """Mapped by an entry that is present for the kernel, or that stands for a page in memory: one that
    is migrating, or that a device has."""
    anon: int = 0
    """Of the checked: in anonymous folios, KSM left out."""
    checked: int = 0
    verified: int = 0
    """Anonymous, KSM's among them: their index was compared with the VMA's offset."""
    unverified: Counter[str] = field(default_factory=Counter)
    """Pages that are or may be anonymous, and whose index was not compared, by reason."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Pages and entries that were not judged, by reason; entries of swap are counted here too."""
    swapcache: int = 0
    """Entries of swap whose page in the swap cache was judged; not among the present ones."""

    def add(self, other: PageCounts) -> None:
        """Add another process's."""
        self.present += other.present
        self.anon += other.anon
        self.checked += other.checked
        self.verified += other.verified
        self.unverified += other.unverified
        self.skipped += other.skipped
        self.swapcache += other.swapcache

    def times(self, number: int) -> PageCounts:
        """As many of each."""
        return PageCounts(
            self.present * number,
            self.anon * number,
            self.checked * number,
            self.verified * number,
            Counter({reason: pages * number for reason, pages in self.unverified.items()}),
            Counter({reason: pages * number for reason, pages in self.skipped.items()}),
            self.swapcache * number,
        )


class VmaRow(NamedTuple):
    """One VMA, with what a table shows of it."""

    vma: Vma
    kind: str
    name: str


@dataclass(slots=True)
class TaskReport:
    """One process."""

    pid: int
    comm: str
    vma_count: int = 0
    vmas: list[VmaRow] = field(default_factory=list)
    """Its VMAs, if they were asked for."""
    pages: PageCounts = field(default_factory=PageCounts)
    findings: list[Finding] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    """Sentences: what could not be checked, and why."""
    judged: bool = False
    """Whether its pages were looked at, so that they are counted here."""
    gone: bool = False
    """It exited or called exec while it was read, so that nothing is said of it."""


# The invariants by which PageCounts.verified pages are judged.
INDEX_IDS = frozenset({"FOLIO-INDEX", "KSM-INDEX"})


@dataclass(slots=True)
class Report:
    """What one command found: of all processes the sums, of the findings the worst.

    What it keeps does not grow with the machine, so that each process can be forgotten once it is added.
    """

    max_findings: int = MAX_FINDINGS
    processes: int = 0
    """Address spaces that were checked."""
    vmas: int = 0
    gone: int = 0
    """Processes that exited or called exec while they were read."""
    pages: PageCounts = field(default_factory=PageCounts)
    counts: Counter[tuple[str, Severity]] = field(default_factory=Counter)
    """All findings, by invariant and severity."""
    misindexed: int = 0
    """Base pages whose index is wrong, by findings of severity error."""
    incomplete: list[str] = field(default_factory=list)
    """Sentences: what could not be checked, and why; the first *max_findings* of them."""
    incomplete_count: int = 0
    comms: dict[int, str] = field(default_factory=dict)
    """Names of the processes that findings are kept of, by PID."""
    _kept: dict[Severity, list[Finding]] = field(default_factory=lambda: {s: [] for s in Severity})

    def add(self, task: TaskReport) -> None:
        """Add what was found in one process."""
        self.processes += task.judged
        self.gone += task.gone
        self.vmas += task.vma_count
        self.pages.add(task.pages)
        for finding in task.findings:
            if self.note(finding) and finding.pid == task.pid:
                self.comms[task.pid] = task.comm
        for sentence in task.incomplete:
            self.note_incomplete(sentence)

    def note(self, finding: Finding) -> bool:
        """Count a finding, and keep it if there is room; returns whether it was kept.

        For a worse one room is made.
        """
        self.counts[finding.id, finding.severity] += 1
        if finding.id in INDEX_IDS and finding.severity is Severity.ERROR:
            self.misindexed += finding.pages
        order = list(Severity)
        if sum(map(len, self._kept.values())) >= self.max_findings:
            lesser = order[order.index(finding.severity) + 1 :]
            victims = next((self._kept[s] for s in reversed(lesser) if self._kept[s]), None)
            if victims is None:
                return False
            victims.pop()
        self._kept[finding.severity].append(finding)
        return True

    def note_incomplete(self, sentence: str, *, first: bool = False) -> None:
        """Count a sentence about what could not be checked, and keep it if there is room.

        :param first: whether it explains the others: then it is kept before them, room or not
        """
        self.incomplete_count += 1
        if first:
            self.incomplete.insert(0, sentence)
        elif len(self.incomplete) < self.max_findings:
            self.incomplete.append(sentence)

    def findings(self) -> list[Finding]:
        """The findings that were kept, the worst first."""
        return [finding for severity in Severity for finding in self._kept[severity]]

    def omitted(self) -> Counter[tuple[str, Severity]]:
        """How many were not kept, by invariant and severity."""
        return self.counts - Counter((finding.id, finding.severity) for finding in self.findings())

    def summary(self) -> dict[Severity, int]:
        """All findings by severity."""
        out = dict.fromkeys(Severity, 0)
        for (_, severity), number in self.counts.items():
            out[severity] += number
        return out

    def exit_status(self, strict: bool = False) -> int:
        """0 consistent, 1 an error (with *strict*, or a warning), 3 something could not be checked."""
        summary = self.summary()
        if summary[Severity.ERROR] or (strict and summary[Severity.WARNING]):
            return 1
        return 3 if self.incomplete_count else 0
