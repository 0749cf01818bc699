# SPDX-License-Identifier: GPL-2.0-only
"""docs/detection.md: each invariant is silent on what is healthy, and found where it is broken."""

from pathlib import Path

import pytest

from kvirt.checks.registry import every_check
from kvirt.findings import Severity
from kvirt.lab.damage import DAMAGES
from tests.conftest import LEGACY, MODERN
from tests.vmcore.conftest import Dump, whole_of
from tests.vmcore.damaged import damaged, machine_findings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "detection.md"
# What the healthy dumps hold at the least: that a check is silent says little if it has nothing to look at.
PROCESSES, VMAS, ANON_PAGES = 15, 2500, 70_000
HEAD = f"""# What is detected

Written by the tests (`scripts/test tests/vmcore/test_detection.py --write-docs`), and compared with what
they see in each run. They check every process of a dump of a guest that runs [the workload](lab.md): for
each kernel at the least {PROCESSES} processes, {VMAS:,} VMAs and {ANON_PAGES:,} verified anonymous pages.
"silent" is without error or warning there; "warns" is a warning for a state that is odd and legal, which
the workload provokes on purpose. Then each damage is laid over the dump in turn (`kvirt lab damage NAME
PID`: "plain" is the invariant's own name, the others are ID/NAME). It is found under the invariant's name
and at the right place, and nothing is found but what the damage breaks.

A dash: means nothing on this kernel.

"""
KERNELS = "Kernels: Linux "


def cell(dump, check):
    """Silent or not, and the damages that are found."""
    whole = whole_of(dump)
    if not check.applies(whole.layout):
        return "-", "-"
    said = {f.severity for r in whole.reports.values() for f in r.findings if f.id == check.id}
    if check.machine is not None:
        said = {f.severity for f in machine_findings(dump) if f.id == check.id}
    assert Severity.ERROR not in said, check.id
    fires = []
    for name in DAMAGES:
        if name.partition("/")[0] != check.id:
            continue
        outcome = damaged(dump, name)
        if outcome.meaningless is None:
            assert check.id in {f.id for f in outcome.new}, name
            fires.append(name.partition("/")[2] or "plain")
    assert fires, f"nothing shows that {check.id} can fire"
    fires.sort(key=lambda way: (way != "plain", way))
    return "warns" if Severity.WARNING in said else "silent", ", ".join(fires)


@pytest.fixture(scope="module")
def dumps(request):
    return {
        MODERN: Dump(*request.getfixturevalue("core73")),
        LEGACY: Dump(*request.getfixturevalue("core_legacy")),
    }


def test_dumps_hold_enough_to_look_at(dumps):
    for dump in dumps.values():
        reports = whole_of(dump).reports.values()
        assert len(reports) >= PROCESSES
        assert sum(report.vma_count for report in reports) >= VMAS
        assert sum(report.pages.verified for report in reports) >= ANON_PAGES


def test_table_is_what_the_dumps_show(dumps, request):
    head = ["invariant", "severity"]
    head += [f"{what} {kernel}" for kernel in dumps for what in ("healthy", "damage found on")]
    rows = [head, ["---"] * len(head)]
    for check in every_check():
        cells = [part for dump in dumps.values() for part in cell(dump, check)]
        rows.append([check.id, str(check.severity), *cells])
    kernels = ", ".join(dump.opened().prog["UTS_RELEASE"].string_().decode() for dump in dumps.values())
    generated = f"{HEAD}{KERNELS}{kernels}.\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    if request.config.getoption("--write-docs"):
        PAGE.write_text(generated)
    written = PAGE.read_text()
    if f"{KERNELS}{kernels}.\n" not in written:
        # Another update of a kernel has other odd states: 6.12.117 has one more than 6.12.107.
        written, generated = (without_odd_states(text) for text in (written, generated))
    assert written == generated, "docs/detection.md is not what this run gives: use --write-docs"


def without_odd_states(text):
    """The table without which kernels these are, and what is odd and legal there."""
    lines = [line for line in text.splitlines() if not line.startswith(KERNELS)]
    return "\n".join(lines).replace("| warns |", "| silent |")
