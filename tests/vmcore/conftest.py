# SPDX-License-Identifier: GPL-2.0-only
"""Dumps of real kernels with the workload running, and kvirt's own reading of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from drgn.helpers.linux.pid import for_each_task

from kvirt.checks.process import ProcessChecker
from kvirt.checks.task import check_task
from kvirt.findings import TaskReport
from kvirt.layout import Layout, layout_of
from kvirt.target import Target, open_target
from kvirt.tasks import Process, find_process

TREE = Path(__file__).resolve().parents[2]


# A kernel's debug information is large, and read anew by each program that opens it.
_OPENED: dict[Path, Target] = {}


@dataclass(frozen=True)
class Dump:
    """A dump, the debug file it goes with, and what the workload in it says of itself."""

    core: Path
    vmlinux: Path
    workload: dict[str, Any]

    def open(self) -> Target:
        """Open it anew, for an overlay that stays."""
        return open_target(core=self.core, symbols=[self.vmlinux])

    def opened(self) -> Target:
        """It as it is, opened once; an overlay has to be undone."""
        if self.core not in _OPENED:
            _OPENED[self.core] = self.open()
        return _OPENED[self.core]

    def kvirt(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run kvirt on it."""
        return kvirt("-c", self.core, "-s", self.vmlinux, *arguments)

    def script(self, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run one of the plain scripts on it, in stock drgn, from elsewhere than the tree."""
        return self.drgn(TREE / "scripts" / name, *arguments)

    def drgn(self, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run any script so."""
        drgn = Path(sys.executable).parent / "drgn"
        argv = [drgn, "-q", "-c", self.core, "-s", self.vmlinux, script, *arguments]
        return subprocess.run(
            [str(word) for word in argv], capture_output=True, text=True, cwd="/", check=False
        )

    @property
    def pid(self) -> int:
        """The workload's main process."""
        return int(self.workload["pid"])

    def processes(self) -> dict[str, int]:
        """PIDs of the workload's processes by name."""
        return {process["name"]: process["pid"] for process in self.workload["processes"]}


def kvirt(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run kvirt with words of any kind."""
    argv = [sys.executable, "-m", "kvirt", *(str(word) for word in arguments)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=TREE, check=False)


@pytest.fixture(scope="session", params=["core73", "core_legacy"])
def dump(request: pytest.FixtureRequest) -> Dump:
    """The dump of each kernel that is tried."""
    return Dump(*request.getfixturevalue(request.param))


@dataclass(frozen=True)
class Whole:
    """Everything that kvirt says of one dump."""

    layout: Layout
    processes: list[Process]
    reports: dict[int, TaskReport]


_WHOLES: dict[Path, Whole] = {}


def whole_of(dump: Dump) -> Whole:
    """Every process of a dump, checked once a session."""
    if dump.core not in _WHOLES:
        target = dump.opened()
        layout = layout_of(target.prog)
        checker = ProcessChecker(target.prog, layout, moves=False)
        processes = [
            find_process(target.prog, task.pid.value_())
            for task in for_each_task(target.prog)
            if task.mm and task.pid == task.tgid
        ]
        reports = {process.pid: check_task(checker, process) for process in processes}
        _WHOLES[dump.core] = Whole(layout, processes, reports)
    return _WHOLES[dump.core]


@pytest.fixture(scope="session")
def whole(dump: Dump) -> Whole:
    """Every process of a dump, checked."""
    return whole_of(dump)


@pytest.fixture(scope="session")
def core73_dump(core73: tuple[Path, Path, dict[str, Any]]) -> Dump:
    """The dump of the kernel that has anonymous page offsets."""
    return Dump(*core73)
