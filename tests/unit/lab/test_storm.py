# SPDX-License-Identifier: GPL-2.0-only
"""The storm without a guest: what is counted, what is drawn, and what a round's line says."""

import errno
import json
import os
import random
import subprocess
import sys

from kvirt.findings import Finding, Report, Severity, TaskReport
from kvirt.lab.procfs import PAGE_SIZE, read_maps
from kvirt.lab.storm.arena import SLOT, SLOTS, Arena, make_paper
from kvirt.lab.storm.processes import NAMES, Account, Budget
from kvirt.lab.storm.watch import Total
from kvirt.lab.workload import syscalls as sc

# In a process of its own: memory of this one is not to be played with.
EVERY_OPERATION = """
import json, random, sys
from kvirt.lab.storm.arena import Arena, NoArea, make_paper
from kvirt.lab.storm.operations import OPERATIONS
arena = Arena(random.Random(1), make_paper())
done = set()
for _ in range(20):
    for operation in OPERATIONS:
        try:
            operation.run(arena)
            done.add(operation.name)
        except (OSError, NoArea):
            pass
print(json.dumps(sorted(done)))
"""


def test_operations_are_done_where_the_machine_allows_them():
    argv = [sys.executable, "-c", EVERY_OPERATION]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    always = {
        "mmap anon",
        "mmap file",
        "mremap away",
        "mremap home",
        "mremap part",
        "mprotect",
        "munmap part",
    }
    assert always <= set(json.loads(done.stdout))


def test_every_operation_is_counted_once():
    account = Account()
    for _ in range(3):
        account.note("mprotect")
    account.note("mprotect", OSError(errno.ENOMEM, ""))
    account.note("uffd move", OSError(errno.EINVAL, ""))
    account.read()
    assert account.done == {"mprotect": 3}
    assert account.refused["mprotect"] == {errno.ENOMEM: 1}
    missing = account.missing()
    assert set(missing) == set(NAMES) - {"mprotect"}
    assert missing["uffd move"] == "EINVAL 1 times"
    assert missing["fork"] == "never tried"


def test_there_are_no_more_processes_than_the_budget_allows():
    budget = Budget(2)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    budget.give_back()
    assert [budget.take(), budget.take()] == [True, False]


def test_a_slot_is_closed_when_it_is_cleared():
    arena = Arena(random.Random(1), make_paper())
    area = arena.map("anon", sc.MAP_PRIVATE | sc.MAP_ANONYMOUS, pages=4)
    start, size = arena.part(area)
    assert area.start <= start and start + size <= area.start + 4 * PAGE_SIZE
    arena.write(area.start, area.size)
    arena.clear(area.slot)
    inside = [m for m in read_maps() if arena.base <= m.start < arena.base + SLOTS * SLOT]
    assert {mapping.perms for mapping in inside} <= {"---p"}
    assert arena.areas == {}
    sc.munmap(arena.base, SLOTS * SLOT)
    os.close(arena.paper)


def test_rounds_are_summed_up():
    total = Total()
    for pid in (1, 2):
        report = Report()
        task = TaskReport(pid, "sh", judged=True)
        task.pages.verified = 10
        task.findings = [
            Finding("FOLIO-INDEX", Severity.ERROR, "wrong", pid=pid, address=0x1000, expected=1, actual=2),
            Finding("AVC-SELF", Severity.TRANSIENT, "for a moment", pid=pid),
        ]
        task.incomplete = [f"PID {pid} (sh): 3 tables cannot be read, the first at 0x{pid}000."]
        report.add(task)
        line = total.add(report, 0.5)
        assert line["findings"] == {"error": {"FOLIO-INDEX": 1}, "transient": {"AVC-SELF": 1}}
        assert line["errors"][0]["address"] == "0x1000"
        assert line["errors"][0]["comm"] == "sh"
    summary = total.as_json()
    assert (summary["rounds"], summary["processes"], summary["seconds"]) == (2, 2, 1.0)
    assert summary["pages"]["verified"] == 20
    assert summary["findings"]["error"] == {"FOLIO-INDEX": 2}
    # The same sentence, whoever it is about.
    assert list(summary["incomplete"].values()) == [2]
