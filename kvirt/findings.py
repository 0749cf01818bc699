# SPDX-License-Identifier: GPL-2.0-only
"""What checks say: findings, what they looked at, and the verdict over all of it."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field

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
    """Mapped by an entry that is present for the kernel."""
    anon: int = 0
    """Of the checked: in anonymous folios, KSM left out."""
    checked: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Pages and entries that were not judged, by reason; those not present are counted here too."""


@dataclass(frozen=True, slots=True)
class VmaRow:
    """One VMA, with what a table shows of it."""

    vma: Vma
    kind: str
    name: str


@dataclass(slots=True)
class TaskReport:
    """One process."""

    pid: int
    comm: str
    vmas: list[VmaRow] = field(default_factory=list)
    pages: PageCounts = field(default_factory=PageCounts)
    findings: list[Finding] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    """Sentences: what could not be checked, and why."""


@dataclass(slots=True)
class Report:
    """Everything that one command found."""

    tasks: list[TaskReport] = field(default_factory=list)

    def findings(self) -> list[Finding]:
        """All findings, in the order of the processes."""
        return [finding for task in self.tasks for finding in task.findings]

    def incomplete(self) -> list[str]:
        """All sentences about what could not be checked."""
        return [sentence for task in self.tasks for sentence in task.incomplete]

    def summary(self) -> dict[Severity, int]:
        """Findings by severity."""
        counts = Counter(finding.severity for finding in self.findings())
        return {severity: counts[severity] for severity in Severity}

    def exit_status(self, strict: bool = False) -> int:
        """0 consistent, 1 an error (with *strict*, or a warning), 3 something could not be checked."""
        summary = self.summary()
        if summary[Severity.ERROR] or (strict and summary[Severity.WARNING]):
            return 1
        return 3 if self.incomplete() else 0
