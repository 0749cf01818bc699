# SPDX-License-Identifier: GPL-2.0-only
"""Checks every process of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import drgn

from kvirt.checks.mapcount import ID as MAPCOUNT
from kvirt.checks.mapcount import FolioMapcounts
from kvirt.checks.process import ProcessChecker
from kvirt.checks.sorting import HWPOISON
from kvirt.checks.task import check_task
from kvirt.errors import KvirtError
from kvirt.filtered import is_filtered, why_filtered
from kvirt.findings import Report, TaskReport
from kvirt.layout import Layout
from kvirt.limits import MAX_FINDINGS
from kvirt.tasks import Process, find_process, for_each_process

# A process that calls exec again and again is followed so many times.
EXECS = 3


@dataclass(slots=True)
class Progress:
    """How far the checking of a machine has come."""

    total: int
    """Processes."""
    done: int = 0
    pages: int = 0
    """Base pages seen."""


class MachineChecker:
    """Checks all processes of one kernel, as often as wanted."""

    def __init__(self, prog: drgn.Program, layout: Layout, *, moves: bool) -> None:
        """Prepare.

        :param moves: whether the kernel runs while it is read
        """
        self.prog = prog
        self.layout = layout
        self.moves = moves

    def check(
        self, max_findings: int = MAX_FINDINGS, progress: Callable[[Progress], None] = lambda progress: None
    ) -> Report:
        """Check every process there is now; returns the sums, and the worst findings."""
        report = Report(max_findings)
        for _ in self.tasks(report, progress):
            pass
        return report

    def tasks(
        self,
        report: Report,
        progress: Callable[[Progress], None] = lambda progress: None,
        *,
        rows: bool = False,
    ) -> Iterator[TaskReport]:
        """Check one process after the other; each is added to the report before it is given out.

        Processes that come later are not looked at. The sentences about those that exit meanwhile are
        left out: the report counts them.

        :param report: gets everything that is found
        :param rows: whether to list the VMAs of each
        """
        mapcounts = None if self.moves else FolioMapcounts(self.prog, self.layout)
        # One for all of them: what belongs to several processes is judged once all have been read.
        if mapcounts is None:
            checker = ProcessChecker(self.prog, self.layout, moves=self.moves)
        else:
            checker = ProcessChecker(self.prog, self.layout, moves=self.moves, watch=mapcounts.add)
        processes = for_each_process(self.prog, moves=self.moves)
        then = "try again" if self.moves else "the dump may lack memory, or it is damaged"
        if any(map(is_filtered, processes.troubles)):
            then = "the dump lacks memory"
        for trouble in processes.troubles:
            report.note_incomplete(
                f"The table of PIDs cannot be followed, and processes may be missing: {trouble}; {then}."
            )
        if not processes.found:
            report.note_incomplete(f"No process with an address space was found: {then}.")
            if mapcounts is not None:
                mapcounts.skip("no process was found")
        if processes.troubles and mapcounts is not None:
            mapcounts.skip("processes may be missing")
        so_far = Progress(len(processes.found))

        def count(pages: int) -> None:
            so_far.pages += pages
            progress(so_far)

        for process in processes.found:
            if mapcounts is not None:
                mapcounts.pid = process.pid
            task = self._check(checker, process, count, rows)
            if mapcounts is not None:
                if task.incomplete:
                    mapcounts.skip(f"PID {task.pid} ({task.comm}) could not be read whole")
                elif task.pages.skipped[HWPOISON]:
                    mapcounts.skip(f"PID {task.pid} ({task.comm}) maps poisoned pages")
            report.add(task)
            yield task
            so_far.done += 1
            progress(so_far)
        if mapcounts is not None:
            self._add_mapcounts(report, mapcounts, {p.pid: p.comm for p in processes.found})
        why = why_filtered(self.prog, report.incomplete)
        if why is not None:
            report.note_incomplete(why, first=True)

    def _add_mapcounts(self, report: Report, mapcounts: FolioMapcounts, comms: dict[int, str]) -> None:
        for finding in mapcounts.findings():
            if report.note(finding) and finding.pid is not None:
                report.comms[finding.pid] = comms[finding.pid]
        if mapcounts.skipped is not None:
            report.note_incomplete(f"{MAPCOUNT} was not checked: {mapcounts.skipped}.")

    def _check(
        self, checker: ProcessChecker, process: Process, progress: Callable[[int], None], rows: bool
    ) -> TaskReport:
        """Check a process; where it calls exec meanwhile, what it is then."""
        for _ in range(EXECS + 1):
            task = check_task(checker, process, progress, rows=rows)
            if not task.gone:
                break
            task.incomplete.clear()
            try:
                process = find_process(self.prog, process.pid)
            except KvirtError:
                break
        return task
