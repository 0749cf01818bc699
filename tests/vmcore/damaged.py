# SPDX-License-Identifier: GPL-2.0-only
"""What each damage, laid over a dump, makes kvirt say that it did not say before."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvirt.checks.process import ProcessChecker
from kvirt.checks.registry import all_checks
from kvirt.checks.task import check_task
from kvirt.errors import KvirtError
from kvirt.findings import Finding
from kvirt.lab.damage import DAMAGES, Damaged, Scene
from kvirt.layout import Layout, layout_of
from kvirt.tasks import find_process
from tests.vmcore.conftest import Dump, whole_of


@dataclass(frozen=True)
class Outcome:
    """One damage over one dump."""

    meaningless: str | None = None
    """Why it is no damage on this kernel, if it is none."""
    made: Damaged | None = None
    new: list[Finding] = field(default_factory=list)


def _meaningless(name: str, layout: Layout) -> str | None:
    if name.partition("/")[0] not in {check.id for check in all_checks(layout)}:
        return f"{name} means nothing under the scheme {layout.scheme} of this kernel."
    if name == "FOLIO-INDEX/file-offset" and layout.scheme == "legacy":
        return "A legacy kernel indexes by the file offset, and is right to."
    if name.partition("/device")[1] and "device-private" not in layout.swap_types.names:
        return "This kernel is built without device memory (CONFIG_DEVICE_PRIVATE)."
    if name == "SWAPCACHE-INDEX/large" and layout.scheme == "legacy":
        return "Linux 6.12 brings large folios back from zram without the swap cache."
    return None


_OUTCOMES: dict[tuple[Path, str], Outcome] = {}


def damaged(dump: Dump, name: str) -> Outcome:
    """Damage a dump, in the first process of the workload that has what it needs; once a session."""
    key = dump.core, name
    if key not in _OUTCOMES:
        _OUTCOMES[key] = _damage(dump, name)
    return _OUTCOMES[key]


def _damage(dump: Dump, name: str) -> Outcome:
    whole = whole_of(dump)
    meaningless = _meaningless(name, whole.layout)
    if meaningless is not None:
        return Outcome(meaningless)
    target = dump.open()
    checker = ProcessChecker(target.prog, layout_of(target.prog), moves=False)
    for pid in [dump.pid, *dump.processes().values()]:
        process = find_process(target.prog, pid)
        try:
            made = DAMAGES[name](Scene(target.prog, process.mm))
        except KvirtError as error:
            why = str(error)
            continue
        before = {(f.id, f.vma, f.address) for f in whole.reports[pid].findings}
        found = check_task(checker, process).findings
        return Outcome(None, made, [f for f in found if (f.id, f.vma, f.address) not in before])
    raise AssertionError(f"{name} could not be made up: {why}")
