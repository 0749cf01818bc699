# SPDX-License-Identifier: GPL-2.0-only
"""What each damage, laid over a dump, makes kvirt say that it did not say before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvirt.checks.machine import MachineChecker
from kvirt.checks.process import ProcessChecker
from kvirt.checks.registry import CHECKS, all_checks
from kvirt.checks.task import check_task
from kvirt.errors import KvirtError
from kvirt.findings import Finding, Report
from kvirt.lab.damage import DAMAGES, Damaged, Scene
from kvirt.lab.damage.scene import Inapplicable
from kvirt.layout import Layout, layout_of
from kvirt.target import Target
from kvirt.tasks import Process, find_process
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
    if name.partition("/device")[1] and "device-private" not in layout.swap_types.names:
        return "This kernel is built without device memory (CONFIG_DEVICE_PRIVATE)."
    if name == "SWAPCACHE-INDEX/large" and layout.scheme == "legacy":
        return "Linux 6.12 brings large folios back from zram without the swap cache."
    return None


def check_machine(target: Target) -> Report:
    """Check all processes of a dump together."""
    report = MachineChecker(target.prog, layout_of(target.prog), moves=False).check()
    assert report.incomplete == []
    return report


_HEALTHY: dict[Path, list[Finding]] = {}


def machine_findings(dump: Dump) -> list[Finding]:
    """What is said of a dump as a whole, without damage."""
    if dump.core not in _HEALTHY:
        _HEALTHY[dump.core] = check_machine(dump.opened()).findings()
    return _HEALTHY[dump.core]


_OUTCOMES: dict[tuple[Path, str], Outcome] = {}


def damaged(dump: Dump, name: str) -> Outcome:
    """Damage a dump, in the first process of the workload that has what it needs; once a session."""
    key = dump.core, name
    if key not in _OUTCOMES:
        _OUTCOMES[key] = _damage(dump, name)
    return _OUTCOMES[key]


@contextlib.contextmanager
def scene_of(target: Target, process: Process) -> Iterator[Scene]:
    """A process to damage, which is mended behind the block: others see the same dump."""
    scene = Scene(target.prog, process.mm)
    try:
        yield scene
    finally:
        scene.overlay.undo()


def _damage(dump: Dump, name: str) -> Outcome:
    whole = whole_of(dump)
    meaningless = _meaningless(name, whole.layout)
    if meaningless is not None:
        return Outcome(meaningless)
    target = dump.opened()
    # Before anything is damaged.
    known = machine_findings(dump)
    for pid in [dump.pid, *dump.processes().values()]:
        process = find_process(target.prog, pid)
        with scene_of(target, process) as scene:
            try:
                made = DAMAGES[name](scene)
            except Inapplicable as error:
                return Outcome(str(error))
            except KvirtError as error:
                why = str(error)
                continue
            if CHECKS[made.id].machine is not None:
                found = check_machine(target).findings()
                return Outcome(None, made, [f for f in found if f not in known])
            checker = ProcessChecker(target.prog, whole.layout, moves=False)
            before = {(f.id, f.vma, f.address) for f in whole.reports[pid].findings}
            found = check_task(checker, process).findings
            return Outcome(None, made, [f for f in found if (f.id, f.vma, f.address) not in before])
    raise AssertionError(f"{name} could not be made up: {why}")
