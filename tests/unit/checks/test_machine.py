# SPDX-License-Identifier: GPL-2.0-only
"""How the processes of a machine are gone through: which come, go and call exec is made up."""

import weakref

import pytest

from kvirt.checks import machine
from kvirt.checks.machine import EXECS, MachineChecker
from kvirt.cli.check_all import _until_interrupted
from kvirt.cli.common import progress_text
from kvirt.errors import KvirtError
from kvirt.findings import Finding, PageCounts, Report, Severity, TaskReport
from kvirt.tasks import Process, Processes
from tests.unit.fake import Memory, make_layout


class Handle:
    """Lives as long as the list of rows that it is in."""


class Machine:
    """Processes by PID; each has a list of the address spaces that it has, one after the other."""

    def __init__(self, monkeypatch, *pids):
        self.spaces = {pid: [pid * 0x1000] for pid in pids}
        self.troubles = []
        self.exiting = set()
        self.checkers = []
        self.alive = weakref.WeakSet()
        self.most_alive = 0
        monkeypatch.setattr(machine, "for_each_process", self.for_each_process)
        monkeypatch.setattr(machine, "find_process", self.find_process)
        monkeypatch.setattr(machine, "check_task", self.check_task)

    def for_each_process(self, prog, *, moves):
        found = [Process(pid, f"comm-{pid}", spaces[0]) for pid, spaces in self.spaces.items()]
        return Processes(found, troubles=self.troubles)

    def find_process(self, prog, pid):
        if not self.spaces[pid]:
            raise KvirtError("no such process")
        return Process(pid, f"comm-{pid}", self.spaces[pid][0])

    def check_task(self, checker, process, progress, *, rows):
        self.checkers.append(checker)
        out = TaskReport(process.pid, process.comm, 3)
        out.vmas = [Handle()]
        self.alive.add(out.vmas[0])
        self.most_alive = max(self.most_alive, len(self.alive))
        progress(10)
        # What comes next is what the process has when it has been read.
        spaces = self.spaces[process.pid]
        if process.pid in self.exiting:
            spaces.clear()
        if len(spaces) != 1:
            del spaces[:1]
            out.gone = True
            out.vmas = []
            out.incomplete.append("exited or called exec")
            return out
        out.judged = True
        out.pages = PageCounts(10, 5, 10, 5)
        out.findings = [Finding("X", Severity.WARNING, "odd", process.pid)]
        return out


def check(made_up, **options):
    return MachineChecker(Memory().prog, make_layout(), moves=True).check(**options)


def test_every_process_is_checked_by_the_same_checker(monkeypatch):
    made_up = Machine(monkeypatch, 1, 2, 3)
    report = check(made_up)
    assert (report.processes, report.vmas, report.pages.present, report.pages.verified) == (3, 9, 30, 15)
    assert report.counts == {("X", Severity.WARNING): 3}
    assert len({id(checker) for checker in made_up.checkers}) == 1
    # And the next time by another, for it has to count anew.
    check(made_up)
    assert len({id(checker) for checker in made_up.checkers}) == 2


def test_rows_are_not_kept(monkeypatch):
    made_up = Machine(monkeypatch, *range(1, 200))
    report = check(made_up, max_findings=10)
    assert made_up.most_alive <= 2
    assert len(report.findings()) == len(report.comms) == 10
    assert report.counts.total() == 199


def test_who_exits_is_counted_and_does_not_matter(monkeypatch):
    made_up = Machine(monkeypatch, 1, 2)
    made_up.exiting = {2}
    report = check(made_up)
    assert (report.processes, report.gone) == (1, 1)
    assert report.incomplete == []
    assert report.exit_status() == 0


@pytest.mark.parametrize(("execs", "judged"), [(1, 1), (EXECS, 1), (EXECS + 1, 0)])
def test_who_calls_exec_is_checked_as_what_it_is_then(monkeypatch, execs, judged):
    made_up = Machine(monkeypatch, 5)
    made_up.spaces[5] = [0x1000 * i for i in range(1, execs + 2)]
    report = check(made_up)
    assert (report.processes, report.gone) == (judged, 1 - judged)
    assert report.exit_status() == 0
    assert len(made_up.checkers) == min(execs, EXECS) + 1


def test_what_cannot_be_followed_leaves_the_verdict_open(monkeypatch):
    made_up = Machine(monkeypatch, 1)
    made_up.troubles = ["its node for 64 and above cannot be read"]
    report = check(made_up)
    assert report.processes == 1
    [sentence] = report.incomplete
    assert "node for 64" in sentence
    assert report.exit_status() == 3


def test_no_process_at_all_is_not_consistent(monkeypatch):
    report = check(Machine(monkeypatch))
    [sentence] = report.incomplete
    assert "No process" in sentence
    assert report.exit_status() == 3


def test_progress_comes_to_its_end(monkeypatch):
    made_up = Machine(monkeypatch, 1, 2, 3)
    seen = []
    check(made_up, progress=lambda p: seen.append((p.done, p.total, p.pages)))
    assert seen[0] == (0, 3, 10)
    assert seen[-1] == (3, 3, 30)
    assert seen == sorted(seen)


def test_progress_line():
    progress = machine.Progress(40)
    assert progress_text(progress, 1.0) == f"[{' ' * 20}] 0/40 processes, 0 pages, 0/s"
    progress.done, progress.pages = 10, 50_000
    text = progress_text(progress, 25.0)
    assert text == f"[{'#' * 5}{' ' * 15}] 10/40 processes, 50,000 pages, 2,000/s, 1:15 left"
    assert progress_text(machine.Progress(0), 1.0).startswith("[")


def test_interrupted_run_says_so():
    report = Report()

    def tasks():
        yield TaskReport(1, "a")
        raise KeyboardInterrupt

    assert [task.pid for task in _until_interrupted(tasks(), report)] == [1]
    assert "Interrupted" in report.incomplete[0]
    assert report.exit_status() == 3
