# SPDX-License-Identifier: GPL-2.0-only
"""Every invariant is broken in turn, over a dump: it is found, named exactly, and nothing else is."""

import pytest

from kvirt.checks.process import ProcessChecker
from kvirt.checks.registry import CHECKS, all_checks
from kvirt.checks.task import check_task
from kvirt.findings import Severity
from kvirt.lab.damage import DAMAGES, Scene
from kvirt.layout import layout_of
from kvirt.tasks import find_process
from tests.vmcore.damaged import check_machine, damaged, machine_findings


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(dump, whole, name):
    result = damaged(dump, name)
    if result.meaningless is not None:
        pytest.skip(result.meaningless)
    made, new = result.made, result.new
    found = [f for f in new if f.id == made.id]
    assert found, made.description
    assert {f.id for f in new} <= {made.id} | made.also
    named = [
        f
        for f in found
        if (made.vma is None or f.vma == made.vma) and (made.address is None or f.address == made.address)
    ]
    assert named, (made, found)
    if not made.spread:
        assert len(found) == made.findings, found
        assert made.vma is None or {f.vma for f in found} == {made.vma}, found
    if made.expected is not None:
        assert {f.expected for f in named} == {made.expected}
    if made.address is not None:
        assert [f.pages for f in named] == [made.pages]
    # On kernels that leave the source of MREMAP_DONTUNMAP displaced, being so is no news.
    expected = {made.severity or CHECKS[made.id].severity}
    if made.id == "LEG-UNFAULTED-PGOFF" and not whole.layout.dontunmap_resets_pgoff:
        expected = {Severity.INFO}
    assert {f.severity for f in found} == expected


def test_behind_all_damage_the_dump_is_as_before(dump):
    assert check_machine(dump.opened()).findings() == machine_findings(dump)


def test_every_invariant_has_a_damage(whole):
    for check in all_checks(whole.layout):
        assert check.id in DAMAGES, f"nothing shows that {check.id} can fire"


def test_the_dump_itself_is_not_changed(dump, whole):
    target = dump.open()
    process = find_process(target.prog, dump.pid)
    before = dump.core.stat()
    DAMAGES["FOLIO-INDEX"](Scene(target.prog, process.mm))
    assert dump.core.stat() == before
    again = dump.open()
    checker = ProcessChecker(again.prog, layout_of(again.prog), moves=False)
    assert check_task(checker, process).findings == whole.reports[dump.pid].findings


def test_other_processes_stay_silent(dump, whole):
    target = dump.open()
    checker = ProcessChecker(target.prog, layout_of(target.prog), moves=False)
    DAMAGES["FOLIO-INDEX"](Scene(target.prog, find_process(target.prog, dump.pid).mm))
    # All of them: what processes share is told with the first.
    for process in whole.processes:
        findings = check_task(checker, process).findings
        assert (findings == whole.reports[process.pid].findings) == (process.pid != dump.pid)
