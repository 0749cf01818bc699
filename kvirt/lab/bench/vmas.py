# SPDX-License-Identifier: GPL-2.0-only
"""What processes with many VMAs, and long chains of forks, take to check."""

from __future__ import annotations

import statistics
from typing import Any

from kvirt.lab.bench.dumps import Memory, Show, dumped
from kvirt.lab.kernels import Kernel
from kvirt.lab.progress import Report, step

# VMAs of one process; processes of which each is the child of the one before.
SIZES = {"vmas": (15_000, 60_000), "chain": (50, 200)}
NAMES = {"vmas": "{:,} VMAs", "chain": "chain of {:,} forks"}


def measure_vmas(kernel: Kernel, rounds: int, report: Report, show: Show) -> dict[str, Any]:
    """How the time grows with VMAs and what binds them to anon_vmas."""
    document: dict[str, Any] = {}
    rows: list[list[str]] = []
    for shape, sizes in SIZES.items():
        smaller = None
        for size in sizes:
            name = NAMES[shape].format(size)
            with (
                dumped(kernel, Memory(shape, size), report, "elf") as [dump],
                step(report, f"Looking at {name}", "vmas"),
            ):
                document[f"{shape} {size}"] = measured = dump.measure(rounds, "check-pid", "lists")
            rows.append(_row(name, measured["ways"], smaller))
            smaller = measured["ways"]
    headers = ["", "VMAs", "AVCs", "check-pid s", "us each", "growth: time", "plain lists s", "us each"]
    show("One process, and a chain of forks, all of them (us for each VMA or AVC)", rows, headers)
    return document


def _row(name: str, ways: dict[str, Any], smaller: dict[str, Any] | None) -> list[str]:
    """One size's figures.

    :param smaller: those of the size before, which this one has grown from
    """
    check, lists = (statistics.median(ways[way]["seconds"]) for way in ("check-pid", "lists"))
    each = [f"{seconds / _number(ways) * 1e6:.0f}" for seconds in (check, lists)]
    growth = ""
    if smaller is not None:
        before = statistics.median(smaller["check-pid"]["seconds"])
        growth = f"{_number(ways) / _number(smaller):.1f} x: {check / before:.1f} x"
    counts = [f"{ways['lists'][what]:,}" for what in ("vmas", "avcs")]
    return [name, *counts, f"{check:.2f}", each[0], growth, f"{lists:.2f}", each[1]]


def _number(ways: dict[str, Any]) -> int:
    return int(ways["lists"]["vmas"] + ways["lists"]["avcs"])
