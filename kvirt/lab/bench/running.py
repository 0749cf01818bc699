# SPDX-License-Identifier: GPL-2.0-only
"""check-pid in a running guest, beside the kernel's own tool and a plain read of its files."""

from __future__ import annotations

import json
import statistics
from typing import Any

from kvirt.lab.bench.dumps import KI, MI, PATIENCE, Memory, Show, memory_of, size
from kvirt.lab.bench.pagetypes import page_types
from kvirt.lab.guest import Guest, GuestError
from kvirt.lab.kernels import Kernel
from kvirt.lab.progress import Report, step

# Where commands in the guest start.
PLACE = "./page-types"
MEMORIES = (
    *(Memory("contiguous", pages) for pages in (64 * KI, 256 * KI, MI)),
    Memory("fragmented", 256 * KI),
)


def measure_running(kernel: Kernel, rounds: int, report: Report, show: Show) -> dict[str, Any]:
    """How fast pages of a live process are looked through."""
    tool = page_types(kernel, report).read_bytes()
    document: dict[str, Any] = {}
    rows: list[list[str]] = []
    for memory in MEMORIES:
        name = f"{memory.shape} {size(memory.pages)}"
        with memory_of(kernel, memory, report) as (guest, [pid]), step(report, f"Looking at {name}", "live"):
            document[name] = _measure(guest, tool, pid, rounds)
        took = {way: statistics.median(seconds) for way, seconds in document[name]["seconds"].items()}
        ways = ("check-pid", "page-types", "plain read", "kcore")
        kvirt, other, plain, memory = (took[way] for way in ways)
        rows.append(
            [
                name,
                *(f"{seconds * 1000:.0f}" for seconds in (kvirt, other, plain, memory)),
                f"{document[name]['pages'] / kvirt:,.0f}",
                f"{other / kvirt:.2f} x",
                f"{kvirt / plain:.2f}",
            ]
        )
    headers = ["pages", "check-pid ms", "page-types ms", "plain read ms", "kcore ms", "pages/s"]
    headers += ["faster than page-types", "of the plain read"]
    show("A running process, in the guest", rows, headers)
    return document


def _measure(guest: Guest, tool: bytes, pid: int, rounds: int) -> dict[str, Any]:
    sent = guest.popen(["sh", "-c", f"cat >{PLACE} && chmod +x {PLACE}"])
    sent.write(tool)
    sent.close_stdin()
    if sent.wait(PATIENCE) != 0:
        raise GuestError("page-types could not be put into the guest.", sent.stderr_text())
    argv = ["python3", "-m", "kvirt.lab.bench.live", PLACE, str(pid), str(rounds)]
    document: dict[str, Any] = json.loads(guest.run(argv, timeout=PATIENCE, check=True).stdout)
    return document
