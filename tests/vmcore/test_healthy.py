# SPDX-License-Identifier: GPL-2.0-only
"""On a healthy kernel every check is silent, and what kvirt reads is what the workload predicts."""

import re

import drgn

from kvirt.checks import reach
from kvirt.checks.process import ProcessChecker
from kvirt.checks.sorting import MARKER, SWAPPED
from kvirt.checks.task import check_task
from kvirt.findings import Severity
from kvirt.lab.workload.regions import expand
from kvirt.layout import Scheme
from kvirt.memory import core_of, unmap_core
from kvirt.mm.forest import read_family
from tests.vmcore.conftest import TREE

# Reachable without a kernel bug, and provoked by these processes on purpose: MADV_WIPEONFORK leaves
# unfaulted memory displaced, and UFFDIO_COPY prepares an anon_vma in a shared mapping.
ODD_AND_LEGAL = {
    "wiped": {"VMA-UNFAULTED-PGOFF"},
    "wiped-kept": {"VMA-UNFAULTED-PGOFF"},
    "uffd-shared": {"ANONVMA-IN-NONCOW"},
}


def test_a_dump_has_holes_and_the_notes_that_a_debugger_needs(dump):
    assert dump.core.stat().st_blocks * 512 < dump.core.stat().st_size / 2
    prog = drgn.Program()
    prog.set_core_dump(dump.core)
    prog.load_debug_info([dump.vmlinux])
    assert prog["init_uts_ns"].name.release.string_().decode() == dump.workload["kernel"]


def test_no_process_has_an_error(whole):
    assert len(whole.reports) > 10
    errors = [f for r in whole.reports.values() for f in r.findings if f.severity is Severity.ERROR]
    assert errors == []
    assert [r.incomplete for r in whole.reports.values() if r.incomplete] == []


def test_nothing_is_transient_in_processes_that_stand_still(whole, dump):
    findings = [f for pid in dump.processes().values() for f in whole.reports[pid].findings]
    assert [f for f in findings if f.severity is Severity.TRANSIENT] == []


def test_warnings_are_where_odd_and_legal_states_were_provoked(whole, dump):
    warned = {}
    for name, pid in dump.processes().items():
        ids = {f.id for f in whole.reports[pid].findings if f.severity is Severity.WARNING}
        if ids:
            warned[name] = ids
    expected = dict(ODD_AND_LEGAL)
    if whole.layout.scheme is Scheme.LEGACY:
        # There unfaulted and displaced is a warning only where MREMAP_DONTUNMAP does not do it too.
        del expected["wiped"], expected["wiped-kept"]
        if whole.layout.dontunmap_resets_pgoff:
            expected |= {name: {"LEG-UNFAULTED-PGOFF"} for name in ("wiped", "wiped-kept")}
    assert warned == expected


def test_every_page_is_accounted_for(whole):
    for report in whole.reports.values():
        pages = report.pages
        skipped = sum(n for reason, n in pages.skipped.items() if reason not in (*SWAPPED, MARKER))
        assert pages.present == pages.checked + skipped
        assert 0 < pages.anon <= pages.checked


def test_what_the_workload_has_in_swap_is_counted_and_found_in_the_swap_cache(whole, dump):
    cached = 0
    for name, pid in dump.processes().items():
        regions = [region for region in dump.workload["regions"] if region["pid"] == pid]
        known = sum(len(expand(r.get("swapped", []))) for r in regions)
        pages = whole.reports[pid].pages
        swapped = sum(pages.skipped[reason] for reason in SWAPPED) + pages.swapcache
        if name == "ksm-swapped":
            # What the reclaim took from its interpreter is nobody's region.
            assert swapped >= known
        else:
            assert swapped == known, name
        held = [r for r in regions if "-cached" in r["name"]]
        assert pages.swapcache >= sum(len(expand(r.get("swapped", []))) for r in held), name
        cached += pages.swapcache
    assert cached > 100


def test_ksm_pages_are_judged_where_the_kernel_keeps_their_index(whole, dump):
    main = whole.reports[dump.pid].pages
    merged = sum(
        len(expand(r["written"])) for r in dump.workload["regions"] if r["name"].startswith("main/ksm/")
    )
    assert merged == 16
    if whole.layout.ksm is None:
        assert main.skipped["KSM pages"] == merged
    else:
        assert not any(reason.startswith("KSM") for reason in main.skipped)


def test_a_merged_page_that_came_back_for_another_place_is_legal(whole, dump):
    findings = {
        name: [f for f in whole.reports[pid].findings if f.id == "SWAPCACHE-INDEX"]
        for name, pid in dump.processes().items()
    }
    merged = findings.pop("ksm-swapped")
    assert not any(findings.values())
    [region] = [r for r in dump.workload["regions"] if r["name"] == "ksm-swapped/region"]
    assert [f.address for f in merged] == expand(region["swapped"])
    assert {f.severity for f in merged} == {Severity.INFO}


def test_every_exec_left_its_stack_displaced(whole):
    stacks = [row for r in whole.reports.values() for row in r.vmas if row.kind == "stack"]
    assert len(stacks) >= len(whole.reports)
    assert all(row.vma.anon_pgoff != row.vma.vm_start >> 12 for row in stacks)


def test_vmas_are_what_the_workload_predicts(whole, dump):
    wrong = []
    compared = 0
    legacy = whole.layout.scheme is Scheme.LEGACY
    for region in dump.workload["regions"]:
        rows = {row.vma.vm_start: row for row in whole.reports[region["pid"]].vmas}
        row = rows[int(region["start"], 16)]
        vm_pgoff = region["vm_pgoff"]
        if legacy:
            vm_pgoff = region.get("legacy_vm_pgoff", vm_pgoff)
        expected = {
            "end": int(region["end"], 16),
            "kind": region["kind"],
            "faulted": region["faulted"],
        }
        found = {"end": row.vma.vm_end, "kind": str(row.kind), "faulted": row.vma.anon_vma != 0}
        if vm_pgoff is not None:
            expected["vm_pgoff"], found["vm_pgoff"] = int(vm_pgoff, 16), row.vma.vm_pgoff
        if region["faulted"] is None:
            del expected["faulted"], found["faulted"]
        if not legacy and region["anon_pgoff"] is not None:
            expected["anon_pgoff"], found["anon_pgoff"] = int(region["anon_pgoff"], 16), row.vma.anon_pgoff
        compared += 1
        if expected != found:
            wrong.append((region["name"], expected, found))
    assert wrong == []
    assert compared > 500


def test_the_pages_that_the_workload_wrote_are_counted(whole, dump):
    for name, pid in dump.processes().items():
        regions = [region for region in dump.workload["regions"] if region["pid"] == pid]
        known = sum(len(expand([*r["written"], *r.get("inherited", [])])) for r in regions)
        assert whole.reports[pid].pages.anon >= known, name


# The plain script for each process in turn, in one drgn, which takes a second to load debug information.
FOR_EACH = """
import runpy, sys
script, *pids = sys.argv[1:]
for pid in pids:
    sys.argv = [script, pid]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, (pid, ended.code)
"""


def test_a_bulk_reading_sees_what_a_plain_loop_sees(dump, whole, tmp_path):
    for_each = tmp_path / "for_each.py"
    for_each.write_text(FOR_EACH)
    processes = dump.processes()
    done = dump.drgn(for_each, TREE / "scripts" / "check_anon_index.py", *processes.values())
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for line, (name, pid) in zip(lines, processes.items(), strict=True):
        match = re.fullmatch(r"(\d+) anonymous pages checked, 0 with a wrong index", line)
        assert match is not None
        # Entries without access rights are present for the kernel, and not for drgn's page walk.
        hidden = sum(
            len(expand([*r["written"], *r.get("inherited", [])]))
            for r in dump.workload["regions"]
            if r["pid"] == pid and not r["prot"]
        )
        assert int(match[1]) + hidden == whole.reports[pid].pages.anon, name


def test_reading_the_file_and_reading_through_drgn_are_the_same(dump, whole):
    target = dump.open()
    assert core_of(target.prog) is not None
    unmap_core(target.prog)
    checker = ProcessChecker(target.prog, whole.layout, moves=False)
    for process in whole.processes:
        report, known = check_task(checker, process), whole.reports[process.pid]
        assert (report.pages, report.findings) == (known.pages, known.findings)
        assert report.incomplete == known.incomplete


def test_the_kernels_own_walk_finds_every_page(dump, whole, monkeypatch):
    """Sound trees are trusted without walking them: this walks them all."""
    target = dump.opened()
    checker = ProcessChecker(target.prog, whole.layout, moves=False)
    trees = {}
    for process in whole.processes:
        space = checker.read(process.mm)
        for root in {anon_vma.root for anon_vma in space.anon_vmas.values()}:
            family = read_family(target.prog, whole.layout, root, [])
            trees.update(family.trees)
    walks = []
    find = reach._is_found
    monkeypatch.setattr(reach, "_is_found", lambda *args: walks.append(args) or find(*args))
    monkeypatch.setattr(checker._forest, "unsound", trees)
    monkeypatch.setattr(checker._forest, "check", lambda space: ([], True))
    for process in whole.processes:
        assert [f for f in check_task(checker, process).findings if f.id == "FOLIO-RMAP-REACH"] == []
    assert len(walks) > 1000
