# SPDX-License-Identifier: GPL-2.0-only
"""What it takes to start kvirt, and to come to the verdict about a small process of a dump."""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial
from typing import Any

from kvirt.lab.bench.dumps import PATIENCE, Dump, Memory, Show, dumped, memory_of
from kvirt.lab.bench.turns import take_turns
from kvirt.lab.guest import Guest, GuestError
from kvirt.lab.kernels import Kernel
from kvirt.lab.progress import Report, step
from kvirt.lab.tree import TREE

KVIRT = [sys.executable, "-m", "kvirt"]
STARTS = {
    "python3 -c pass": [sys.executable, "-c", "pass"],
    "kvirt --version": [*KVIRT, "--version"],
    "kvirt --help": [*KVIRT, "--help"],
}
LOAD = """
import sys, drgn
prog = drgn.Program()
prog.set_core_dump(sys.argv[1])
prog.load_debug_info([sys.argv[2]])
prog["init_task"].comm
"""
TYPES = ("DWARF", "BTF")
# Pages of the small process.
PAGES = 256


def measure_commands(kernel: Kernel, rounds: int, report: Report, show: Show) -> dict[str, Any]:
    """Start commands in turns, and print what they took beyond what nobody can do without."""
    with step(report, f"Starting kvirt, {rounds} rounds", "commands"):
        starts = _take_turns(STARTS, rounds)
    bare = statistics.median(starts["python3 -c pass"])
    rows = [
        [name, f"{median * 1000:.0f}", f"{(median - bare) * 1000:+.0f}"]
        for name, seconds in starts.items()
        for median in [statistics.median(seconds)]
    ]
    show("Starting kvirt", rows, ["", "median ms", "beyond python3 -c pass"])
    small = Memory("contiguous", PAGES)
    with dumped(kernel, small, report, "elf") as [dump]:
        ways = _ways(dump)
        with step(report, f"Checking a small process, {rounds} rounds", "commands"):
            verdicts = _take_turns(ways, rounds)
    load, *checks = (statistics.median(verdicts[name]) for name in ways)
    rows = [["drgn loads the symbols", f"{load:.2f}", ""]]
    rows += [
        [f"kvirt check-pid, types from {types}", f"{check:.2f}", f"{check / load - 1:+.0%}"]
        for types, check in zip(TYPES, checks, strict=True)
    ]
    show(f"A process of {PAGES} pages in a dump", rows, ["", "median s", "beyond loading"])
    with memory_of(kernel, small, report) as (guest, [pid]):
        runs = {
            types: partial(_run_inside, guest, ["--types", types.lower(), "check-pid", str(pid)])
            for types in TYPES
        }
        with step(report, f"Checking it in the running guest, {rounds} rounds", "commands"):
            live = take_turns(runs, rounds)
    dwarf, btf = (statistics.median(live[types]) for types in TYPES)
    rows = [
        ["kvirt check-pid, types from DWARF", f"{dwarf:.1f}", ""],
        ["kvirt check-pid, types from BTF", f"{btf:.1f}", f"{dwarf / btf:.1f} times faster"],
    ]
    show("The same in the running guest", rows, ["", "median s", ""])
    return {"starts": starts, "verdicts": verdicts, "live": live}


def _ways(dump: Dump) -> dict[str, list[str]]:
    core, vmlinux = str(dump.core), str(dump.vmlinux)
    check = ["check-pid", str(dump.pids[0])]
    return {
        "load": [sys.executable, "-c", LOAD, core, vmlinux],
        "DWARF": [*KVIRT, "-c", core, "-s", vmlinux, *check],
        "BTF": [*KVIRT, "-c", core, "--types", "btf", *check],
    }


def _run_inside(guest: Guest, argv: list[str]) -> None:
    guest.run(["kvirt", *argv], timeout=PATIENCE, check=True)


def _take_turns(commands: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    return take_turns({name: partial(_run, name, argv) for name, argv in commands.items()}, rounds)


def _run(name: str, argv: list[str]) -> None:
    done = subprocess.run(argv, cwd=TREE, capture_output=True, text=True)
    if done.returncode != 0:
        raise GuestError(f"{name} failed.", "\n" + done.stderr[-2000:])
