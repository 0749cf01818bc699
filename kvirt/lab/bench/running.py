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
WAYS = ("check-pid", "page-types", "plain read", "dd", "kcore")


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
        kvirt = took["check-pid"]
        rows.append(
            [
                name,
                *(f"{took[way] * 1000:.0f}" if way in took else "" for way in WAYS),
                f"{document[name]['pages'] / kvirt / 1e6:.2f}",
                f"{took['page-types'] / kvirt:.2f} x",
                *(f"{kvirt / took[way]:.2f}" if way in took else "" for way in ("plain read", "dd")),
            ]
        )
    headers = ["pages", *WAYS, "M pages/s", "faster than page-types", "of the plain read", "of dd"]
    show("check-pid of a running process, in the guest (ms)", rows, headers)
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
