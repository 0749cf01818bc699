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
NAMES = {"vmas": "one process of {:,} VMAs", "chain": "a chain of {:,} forks, all of them"}


def measure_vmas(kernel: Kernel, rounds: int, report: Report, show: Show) -> dict[str, Any]:
    """How the time grows with VMAs and what binds them to anon_vmas."""
    document: dict[str, Any] = {}
    rows: list[list[str]] = []
    for shape, sizes in SIZES.items():
        for size in sizes:
            name = NAMES[shape].format(size)
            with (
                dumped(kernel, Memory(shape, size), report, "elf") as [dump],
                step(report, f"Looking at {name}", "vmas"),
            ):
                document[f"{shape} {size}"] = measured = dump.measure(rounds, "check-pid", "lists")
            rows.append(_row(name, measured["ways"]))
    headers = ["", "VMAs", "AVCs", "check-pid s", "us each", "plain lists s", "us each"]
    show("VMAs and anon_vma_chains (us for each VMA or AVC)", rows, headers)
    return document


def _row(name: str, ways: dict[str, Any]) -> list[str]:
    vmas, avcs = ways["lists"]["vmas"], ways["lists"]["avcs"]
    cells = [name, f"{vmas:,}", f"{avcs:,}"]
    for way in ("check-pid", "lists"):
        took = statistics.median(ways[way]["seconds"])
        cells += [f"{took:.2f}", f"{took / (vmas + avcs) * 1e6:.0f}"]
    return cells
