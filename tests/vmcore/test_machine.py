# SPDX-License-Identifier: GPL-2.0-only
"""Every process of a dump: none is missed, none accused, and the sums are those of the parts."""

import json
import subprocess
import sys
from collections import Counter

import jsonschema
import pytest
from drgn.helpers.linux.pid import find_task, for_each_task

from kvirt.checks.machine import MachineChecker
from kvirt.findings import Report, Severity
from kvirt.lab.damage import Scene
from kvirt.lab.overlay import Overlay
from kvirt.layout import layout_of
from kvirt.mm.vma import vma_is_cow_mapping
from kvirt.render.json import schema
from kvirt.render.table import machine_table
from kvirt.tasks import for_each_process
from tests.vmcore.conftest import TREE


@pytest.fixture(scope="module")
def machine(dump):
    """The whole dump by check-all's own code."""
    target = dump.opened()
    report = Report()
    checker = MachineChecker(target.prog, layout_of(target.prog), moves=False)
    return report, list(checker.tasks(report, rows=True))


def address_spaces(prog):
    """What drgn's own helper finds: PIDs by mm."""
    out = {}
    for task in for_each_task(prog):
        if task.mm and not task.flags.value_() & 0x00200000:
            out.setdefault(task.mm.value_(), set()).add(task.pid.value_())
    return out


def test_every_address_space_is_found_once(dump):
    prog = dump.opened().prog
    processes = for_each_process(prog, moves=False)
    assert processes.troubles == []
    assert processes.kernel_threads > 20
    found = {p.mm: {p.pid, *p.others} for p in processes.found}
    assert len(found) == len(processes.found)
    assert found == address_spaces(prog)
    pids = {process.pid for process in processes.found}
    assert set(dump.processes().values()) <= pids
    # The workload's threads are there, and are nobody's second process.
    assert any(process.others for process in processes.found)


def test_no_error_and_nothing_left_out(machine, dump):
    report, tasks = machine
    assert report.summary()[Severity.ERROR] == 0
    assert report.incomplete == []
    assert report.exit_status() == 0
    assert {task.pid for task in tasks} >= {1, *dump.processes().values()}
    assert report.gone == 0


def test_the_sums_are_those_of_the_processes(machine, whole):
    report, tasks = machine
    assert {task.pid for task in tasks} == set(whole.reports)
    for task in tasks:
        alone = whole.reports[task.pid]
        assert (task.vma_count, task.pages) == (alone.vma_count, alone.pages)
        assert [row.vma.address for row in task.vmas] == [row.vma.address for row in alone.vmas]
        assert task.findings == alone.findings
    assert report.processes == len(tasks)
    assert report.vmas == sum(len(task.vmas) for task in tasks)
    assert report.pages.present == sum(task.pages.present for task in tasks)
    assert report.pages.skipped == sum((task.pages.skipped for task in tasks), Counter())
    assert report.counts == Counter((f.id, f.severity) for task in tasks for f in task.findings)


def test_every_anonymous_page_is_verified(machine, whole):
    report, _ = machine
    merged = report.pages.verified - report.pages.anon
    if whole.layout.ksm is None:
        assert merged == 0
        assert set(report.pages.unverified) == {"KSM pages"}
    else:
        assert merged >= 16
        assert not report.pages.unverified
    assert report.pages.anon > 10_000


def test_check_all(dump, machine):
    done = dump.kvirt("check-all")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("CONSISTENT: no errors")
    assert f"{machine[0].processes} processes" in lines[0]
    pages = machine[0].pages
    if pages.unverified:
        assert any(line.startswith("anonymous pages: 99.9% of") for line in lines)
    else:
        assert f"anonymous pages: all {pages.verified:,} verified" in lines
    assert max(len(line) for line in lines) <= 100
    strict = dump.kvirt("check-all", "--strict", "--max-findings", 0)
    assert strict.returncode == 1
    assert "counted and not listed" in strict.stdout


def test_document_of_all(dump, machine):
    report, tasks = machine
    done = dump.kvirt("check-all", "--format", "json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    jsonschema.validate(document, schema("kvirt.check/1"))
    assert [task["pid"] for task in document["tasks"]] == [task.pid for task in tasks]
    assert [len(task["vmas"]) for task in document["tasks"]] == [task.vma_count for task in tasks]
    assert document["totals"]["pages"]["verified"] == report.pages.verified
    assert len(document["findings"]) == report.counts.total()
    # What check-pid says of one process is what stands here.
    alone = json.loads(dump.kvirt("check-pid", dump.pid, "--format", "json").stdout)
    assert alone["tasks"] == [task for task in document["tasks"] if task["pid"] == dump.pid]


def test_tasks_that_cannot_be_read_do_not_hide_the_others(dump):
    target = dump.open()
    before = for_each_process(target.prog, moves=False).found
    threaded = next(process for process in before if process.others)
    link = find_task(target.prog, threaded.pid).thread_pid.tasks[0].first.address_of_()
    Overlay(target.prog).write(link.value_(), (0xDEAD000000000000).to_bytes(8, "little"))
    processes = for_each_process(target.prog, moves=False)
    # A thread stands for it now.
    assert {process.mm for process in processes.found} == {process.mm for process in before}
    [instead] = {process.pid for process in processes.found} - {process.pid for process in before}
    assert instead in threaded.others
    assert processes.troubles == [f"1 of its tasks cannot be read, the first that of PID {threaded.pid}"]
    # While a kernel runs that is somebody who just left.
    assert for_each_process(target.prog, moves=True).troubles == []


@pytest.mark.parametrize("where", ["head", "node", "loop"])
def test_damaged_table_of_pids(dump, where):
    target = dump.open()
    head = target.prog["init_pid_ns"].idr.idr_rt.xa_head
    node = target.prog["init_pid_ns"].idr.idr_rt.xa_head.value_() & ~3
    slots = target.prog.type("struct xa_node").member("slots").offset
    wrong = {
        "head": (head.address_of_().value_(), 0xDEAD000000000002),
        "node": (node + slots + 8, 0xDEAD000000000002),
        "loop": (node + slots + 8, node | 2),
    }[where]
    Overlay(target.prog).write(wrong[0], wrong[1].to_bytes(8, "little"))
    report = MachineChecker(target.prog, layout_of(target.prog), moves=False).check()
    assert report.summary()[Severity.ERROR] == 0
    assert report.exit_status() == 3
    assert any("processes may be missing" in sentence for sentence in report.incomplete)
    # PID 1 lies in the first slot.
    assert (report.processes == 0) == (where == "head")


def test_a_process_that_is_wrong_all_over_is_told_in_a_few_lines(dump):
    """Every VMA's offset is off by one: each page is counted, and no line is printed for each."""
    target = dump.open()
    [process] = [p for p in for_each_process(target.prog, moves=False).found if p.pid == dump.pid]
    scene = Scene(target.prog, process.mm)
    faulted = [vma for vma in scene.space.vmas() if vma.anon_vma and vma_is_cow_mapping(vma)]
    for vma in faulted:
        scene.set_index_base(vma, vma.anon_pgoff + 1)
    report = MachineChecker(target.prog, layout_of(target.prog), moves=False).check(10_000)
    found = [f for f in report.findings() if f.id == "FOLIO-INDEX"]
    assert {f.pid for f in found} == {dump.pid}
    assert report.counts["FOLIO-INDEX", Severity.ERROR] == len(found)
    # One finding for all pages of a VMA, since they are wrong in the same way.
    assert len({f.vma for f in found}) == len(found) > 50
    [alone] = [t for t in MachineChecker(dump.opened().prog, scene.layout, moves=False).tasks(Report())
               if t.pid == dump.pid]  # fmt: skip
    temporary = alone.pages.unverified.total()
    assert sum(f.pages for f in found) >= alone.pages.anon - temporary
    text = machine_table(target, scene.layout, report)
    assert text.startswith("INCONSISTENT")
    assert f"and {len(found) - 3} more FOLIO-INDEX in {len(found) - 3} VMAs" in " ".join(text.split())
    wrong = sum(f.pages for f in report.findings() if f.id in ("FOLIO-INDEX", "KSM-INDEX"))
    assert f" verified, and {wrong:,} of these wrong" in text
    # What else it breaks is told in as few lines of each process.
    groups = {(f.pid, f.id, f.severity) for f in report.findings()}
    assert len(text.splitlines()) < 15 * len(groups) + 15
    assert max(len(line) for line in text.splitlines()) <= 100


def test_process_whose_memory_map_cannot_be_read(dump):
    target = dump.open()
    task = find_task(target.prog, dump.pid)
    Overlay(target.prog).write(task.mm.address_of_().value_(), (0xDEAD000000000000).to_bytes(8, "little"))
    report = MachineChecker(target.prog, layout_of(target.prog), moves=False).check()
    assert report.processes == len(address_spaces(dump.opened().prog)) - 1
    [sentence, consequence] = [s for s in report.incomplete if f"PID {dump.pid} " in s]
    assert "memory map cannot be read" in sentence
    assert consequence.startswith("FOLIO-MAPCOUNT was not checked")
    assert report.exit_status() == 3


# ru_maxrss would count what pytest had before the program was executed.
PEAK = """
import sys
from pathlib import Path
from kvirt.cli import cli
assert cli(sys.argv[1:], standalone_mode=False) == 0
[line] = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
print(line.split()[1], file=sys.stderr)
"""


def peak_rss(dump, *arguments):
    """Of one run of kvirt on a dump, in kilobytes."""
    argv = [sys.executable, "-c", PEAK, "-c", dump.core, "-s", dump.vmlinux, *arguments]
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, cwd=TREE, check=True)
    return int(done.stderr)


def test_memory_is_that_of_the_largest_process(dump, whole):
    largest = max(whole.reports.values(), key=lambda report: report.pages.present).pid
    one = peak_rss(dump, "check-pid", largest, "--format", "json")
    everything = peak_rss(dump, "check-all", "--format", "json")
    print(f"peak resident: {one >> 10} MiB for PID {largest}, {everything >> 10} MiB for all")
    assert everything < one * 1.2
