# SPDX-License-Identifier: GPL-2.0-only
"""What becomes of a process while it is checked."""

from types import SimpleNamespace

import drgn
import pytest

from kvirt.checks import task
from kvirt.checks.process import ProcessResult
from kvirt.checks.task import check_task
from kvirt.errors import KvirtError
from kvirt.findings import Finding, PageCounts, Severity
from kvirt.tasks import Process

MM = 0x1000
SHARED = Process(5, "some", MM, (6, 7))


class Checker:
    """Says what it is told to say, and remembers whether it had to take it back."""

    def __init__(self, *, moves, mm_users=1, fault=False):
        self.prog = None
        self.moves = moves
        self.fault = fault
        self.taken_back = False
        vmas = [SimpleNamespace(vm_mm=MM), SimpleNamespace(vm_mm=0x2000)]
        self.space = SimpleNamespace(address=MM, mm_users=mm_users, vmas=lambda: vmas)

    def check(self, mm, progress):
        if self.fault:
            raise drgn.FaultError("could not read", mm)
        findings = [Finding("X", Severity.ERROR, "own"), Finding("X", Severity.ERROR, "of another", 9)]
        return ProcessResult(self.space, findings, PageCounts(4, 4, 4, 4), ["it is odd"])

    def forget_latest(self):
        self.taken_back = True


def running(monkeypatch, **spaces):
    """Which address space the tasks have, by "pid_N"; the others are gone."""

    def find_process(prog, pid):
        if f"pid_{pid}" not in spaces:
            raise KvirtError("no such process")
        return Process(pid, "some", spaces[f"pid_{pid}"])

    monkeypatch.setattr(task, "find_process", find_process)


@pytest.mark.parametrize("who", ["pid_5", "pid_7"])
def test_one_task_that_has_the_address_space_is_enough(monkeypatch, who):
    running(monkeypatch, **{who: MM})
    report = check_task(Checker(moves=True), SHARED, rows=False)
    assert (report.gone, report.judged, report.vma_count) == (False, True, 1)
    assert [f.pid for f in report.findings] == [5, 9]
    assert report.incomplete == ["PID 5 (some): it is odd."]


@pytest.mark.parametrize("fault", [False, True])
@pytest.mark.parametrize("left", [{}, {"pid_5": 0x9000}])
def test_nothing_counts_of_who_is_gone(monkeypatch, left, fault):
    running(monkeypatch, **left)
    checker = Checker(moves=True, fault=fault)
    report = check_task(checker, SHARED, rows=False)
    assert (report.gone, report.judged, report.findings, report.pages) == (True, False, [], PageCounts())
    assert checker.taken_back
    assert report.incomplete == ["PID 5 (some) exited or called exec while it was read."]


def test_who_is_exiting_is_not_judged(monkeypatch):
    running(monkeypatch)
    report = check_task(Checker(moves=False, mm_users=0), SHARED, rows=False)
    assert (report.gone, report.judged) == (False, False)


def test_what_cannot_be_read_is_a_sentence(monkeypatch):
    running(monkeypatch, pid_5=MM)
    report = check_task(Checker(moves=True, fault=True), SHARED, rows=False)
    assert (report.gone, report.judged) == (False, False)
    assert "memory map cannot be read" in report.incomplete[0]
