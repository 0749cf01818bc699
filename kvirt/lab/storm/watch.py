# SPDX-License-Identifier: GPL-2.0-only
"""Checks a whole machine again and again while the storm goes on in it.

Prints a JSON object a line: that it has opened the kernel; when a line on stdin has told it to begin, one
for each round; and last the summary. An exception is not caught: it is what is looked for.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kvirt.checks.machine import MachineChecker
from kvirt.findings import Finding, Report, Severity
from kvirt.layout import layout_of
from kvirt.target import open_target

ROUNDS = 200
# What differs in sentences that say the same.
_DETAILS = re.compile(r"PID \d+ \(.*?\)|0x[0-9a-f]+|\d+")


def main(argv: list[str]) -> int:
    """Watch, and return the exit status: 0 only if no round found an error."""
    parser = argparse.ArgumentParser(
        prog="python3 -m kvirt.lab.storm.watch", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often to check ({ROUNDS})")
    parser.add_argument("--qemu", type=Path, help="QMP socket of a guest; by default the running kernel")
    parser.add_argument("--core", type=Path, help="or a dump")
    parser.add_argument("--symbols", type=Path, help="its vmlinux")
    options = parser.parse_args(argv)
    if options.qemu is None and options.core is None:
        # The storm has a process for each processor and more; it goes on on all the others.
        os.nice(-20)
    symbols = [options.symbols] if options.symbols else []
    target = open_target(options.core, options.qemu, symbols)
    checker = MachineChecker(target.prog, layout_of(target.prog), moves=target.moves)
    say({"ready": str(target.kind)})
    sys.stdin.readline()
    total = Total()
    for number in range(1, options.rounds + 1):
        started = time.monotonic()
        report = checker.check()
        say({"round": number, **total.add(report, time.monotonic() - started)})
    say({"summary": total.as_json()})
    return 1 if total.findings[Severity.ERROR] else 0


def say(message: dict[str, Any]) -> None:
    """Print one line."""
    print(json.dumps(message), flush=True)


class Total:
    """What all rounds gave."""

    def __init__(self) -> None:
        self.rounds = 0
        self.seconds = 0.0
        self.processes = 0
        self.gone = 0
        self.pages: Counter[str] = Counter()
        self.findings: dict[Severity, Counter[str]] = {severity: Counter() for severity in Severity}
        self.incomplete: Counter[str] = Counter()
        self.errors: list[dict[str, Any]] = []

    def add(self, report: Report, seconds: float) -> dict[str, Any]:
        """Add a round, and return what its line says."""
        found: dict[Severity, Counter[str]] = {severity: Counter() for severity in Severity}
        for (id_, severity), count in report.counts.items():
            found[severity][id_] += count
            self.findings[severity][id_] += count
        incomplete = Counter(_DETAILS.sub("*", sentence) for sentence in report.incomplete)
        errors = [_details(f, report) for f in report.findings() if f.severity is Severity.ERROR]
        self.rounds += 1
        self.seconds += seconds
        self.processes += report.processes
        self.gone += report.gone
        pages = Counter(verified=report.pages.verified, unverified=report.pages.unverified.total())
        self.pages += pages
        self.incomplete += incomplete
        self.errors += errors
        return {
            "seconds": round(seconds, 2),
            "processes": report.processes,
            "gone": report.gone,
            "vmas": report.vmas,
            "pages": pages,
            "findings": _present(found),
            "incomplete": incomplete,
            "errors": errors,
        }

    def as_json(self) -> dict[str, Any]:
        """The sum."""
        return {
            "rounds": self.rounds,
            "seconds": round(self.seconds, 1),
            "processes": self.processes,
            "gone": self.gone,
            "pages": self.pages,
            "findings": _present(self.findings),
            "incomplete": self.incomplete,
            "errors": self.errors,
        }


def _present(found: dict[Severity, Counter[str]]) -> dict[str, Counter[str]]:
    return {str(severity): ids for severity, ids in found.items() if ids}


def _details(finding: Finding, report: Report) -> dict[str, Any]:
    members = ("address", "expected", "actual")
    numbers = {name: hex(n) for name in members if (n := getattr(finding, name)) is not None}
    return {
        "id": finding.id,
        "pid": finding.pid,
        "comm": report.comms.get(finding.pid) if finding.pid is not None else None,
        "message": finding.message,
        "pages": finding.pages,
        "vma": finding.vma and [hex(n) for n in finding.vma],
        **numbers,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
