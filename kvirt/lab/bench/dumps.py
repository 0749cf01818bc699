# SPDX-License-Identifier: GPL-2.0-only
"""Dumps of guests with memory of known shapes, and what looking through them takes."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvirt.lab.guest import Guest, GuestError
from kvirt.lab.kernels import Kernel
from kvirt.lab.progress import Report, step
from kvirt.lab.tree import TREE

KI, MI = 1 << 10, 1 << 20
# Seconds to fault in and to dump the largest memory, emulated on a busy machine.
PATIENCE = 1800
# Host memory that is left to others: QEMU's own, and the page cache that a dump is written through.
MARGIN_MIB = 1536


@dataclass(frozen=True, slots=True)
class Memory:
    """What processes of a guest have."""

    shape: str
    pages: int
    processes: int = 1

    @property
    def guest_mib(self) -> int:
        """Memory the guest needs for it."""
        # Pages, memmap and page tables; to scatter them it takes as many more.
        pages = self.pages * (2 if self.shape == "fragmented" else 1)
        if self.shape == "chain":
            # Each page is a process, with what the interpreter writes to.
            pages = self.pages * 4 * MI // 4096
        return pages * (4096 + 64 + 8) // MI + 768


@dataclass(frozen=True, slots=True)
class Dump:
    """A dump of a guest with such memory, and whose memory it is."""

    core: Path
    vmlinux: Path
    pids: list[int]

    def measure(self, rounds: int, *ways: str) -> dict[str, Any]:
        """Look at it in some ways in turn (kvirt.lab.bench.pages), in a process of its own."""
        argv = [sys.executable, "-m", "kvirt.lab.bench.pages", self.core, self.vmlinux, rounds]
        argv += [",".join(ways), *self.pids]
        done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, cwd=TREE)
        if done.returncode != 0:
            raise GuestError(f"The dump {self.core} could not be looked at.", "\n" + done.stderr[-2000:])
        document: dict[str, Any] = json.loads(done.stdout)
        return document


def free_mib() -> int:
    """Host memory that a guest may have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    [available] = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return available // KI - MARGIN_MIB


@contextlib.contextmanager
def memory_of(kernel: Kernel, memory: Memory, report: Report) -> Iterator[tuple[Guest, list[int]]]:
    """A guest in which processes have some memory, and the processes' PIDs."""
    with Guest(kernel, memory=f"{memory.guest_mib}M", timeout=2 * PATIENCE, report=report) as guest:
        argv = ["python3", "-m", "kvirt.lab.bench.memory", memory.shape, memory.pages, memory.processes]
        process = guest.popen([str(word) for word in argv])
        with step(report, f"Faulting in {size(memory.pages)} pages, {memory.shape}", "memory"):
            line = process.readline(PATIENCE)
        if not line:
            raise GuestError("The guest could not get its memory.", process.stderr_text())
        yield guest, json.loads(line)["pids"]


@contextlib.contextmanager
def dumped(kernel: Kernel, memory: Memory, report: Report, *formats: str) -> Iterator[list[Dump]]:
    """Dumps of one guest with some memory, in one or more formats. They are gone afterwards."""
    assert kernel.vmlinux is not None
    with tempfile.TemporaryDirectory(prefix="kvirt-bench-") as directory:
        with memory_of(kernel, memory, report) as (guest, pids):
            cores = [guest.dump(Path(directory) / format_, format_) for format_ in formats]
        # The guest has ended: its memory is free for the page cache.
        yield [Dump(core, kernel.vmlinux, pids) for core in cores]


def size(pages: int) -> str:
    """A number of pages, in words."""
    return f"{pages // MI} M" if pages >= MI else f"{pages // KI} Ki"


def rate(taken: dict[str, Any], part: str = "seconds") -> float:
    """Pages a second, by the median round."""
    return float(taken["pages"] / statistics.median(taken[part]))


def _millions(taken: dict[str, Any], part: str = "seconds") -> str:
    return f"{rate(taken, part) / 1e6:.3g}"


Show = Callable[[str, list[list[str]], list[str]], None]

# What makes little difference is measured so often.
PAIRS = 61
# What takes milliseconds is measured so many times as often as the rest: it is the first to be lost in noise.
OFTEN = 6
# 1 GiB, in which the plain loop and all shapes are measured.
USUAL = Memory("contiguous", 256 * KI)
LARGE = Memory("contiguous", MI)
LARGEST = Memory("contiguous", 4 * MI)
SHAPES = [Memory(shape, USUAL.pages) for shape in ("fragmented", "huge", "mixed")]
# In which there is little but what any process has.
LEAST = Memory("contiguous", KI)
FEW = Memory("contiguous", 64 * KI)
MEMORIES = [LEAST, FEW, USUAL, *SHAPES, LARGE, LARGEST]
# And as many pages in more and more processes, of each shape that may make a difference.
GROWING = {
    shape: [Memory(shape, FEW.pages * number, number) for number in (1, 8, 64)]
    for shape in ("contiguous", "huge", "mixed")
}


def measure_pages(kernel: Kernel, rounds: int, report: Report, show: Show) -> dict[str, Any]:
    """How fast pages are looked through, beside the plain loop and the fastest that the file can be read."""
    document: dict[str, Any] = {}
    rows: list[list[str]] = []
    for memory in MEMORIES:
        name = _name(memory)
        if not _fits(memory, report):
            continue
        compressed = memory == USUAL
        formats = ["elf", *(["kdump-zlib"] if compressed else [])]
        with dumped(kernel, memory, report, *formats) as dumps, step(report, f"Looking at {name}", "pages"):
            document[name] = _measure(dumps[0], memory, rounds)
            if compressed:
                try:
                    document["kdump-zlib"] = dumps[1].measure(rounds, "check-pid")
                except GuestError as error:
                    report(f"The kdump-compressed dump is left out: {str(error).splitlines()[-1]}")
        rows.append(_row(name, document[name], document.get(_name(LEAST))))
    _show(document, rows, show)
    grown: list[list[str]] = []
    for memories in GROWING.values():
        one: dict[str, Any] | None = None
        for memory in memories:
            if not _fits(memory, report):
                continue
            with (
                dumped(kernel, memory, report, "elf") as [dump],
                step(report, f"Looking at {_name(memory)}", "pages"),
            ):
                grows = document[f"growing {_name(memory)}"] = dump.measure(rounds * OFTEN, "check-pid")
            grown.append(_growth(memory, grows, one))
            one = one or grows
    headers = ["pages", "processes", "ms", "M pages/s", "beside one process", "MiB"]
    show("check-pid of more and more processes of 64 Ki pages", grown, headers)
    return document


def _fits(memory: Memory, report: Report) -> bool:
    """Whether the host has room for the guest; says so if not."""
    if memory.guest_mib <= free_mib():
        return True
    needs = f"the guest needs {memory.guest_mib} MiB, and {free_mib()} are free"
    report(f"{_name(memory)} is left out: {needs}.")
    return False


def _name(memory: Memory) -> str:
    name = f"{memory.shape} {size(memory.pages)}"
    return name if memory.processes == 1 else f"{name} of {memory.processes}"


def _measure(dump: Dump, memory: Memory, rounds: int) -> dict[str, Any]:
    # By itself first: what is resident is not the others' then.
    alone = dump.measure(1, "check-pid")
    # Huge pages take next to no reading, and the limit would say little.
    ways = ["check-pid"]
    if memory.shape in ("contiguous", "fragmented") and memory != LEAST:
        ways.append("limit")
    if memory in (LARGE, LARGEST):
        ways.append("check-all")
    side_by_side = dump.measure(rounds * OFTEN if memory.pages <= USUAL.pages else rounds, *ways)
    if memory == USUAL:
        slow = dump.measure(rounds, "loop", "inflate")
        side_by_side["ways"] |= slow["ways"]
    if memory == LARGE:
        side_by_side["pairs"] = dump.measure(PAIRS, "check-pid", "again", "progress", "rereading")["ways"]
    return {**side_by_side, "drgn_kib": alone["drgn_kib"], "added_kib": alone["added_kib"]}


def _added(pairs: dict[str, Any], way: str) -> float:
    """What a way takes beyond plain check-pid, as a share of it: by the median difference in a round."""
    plain = pairs["check-pid"]["seconds"]
    more = [one - other for one, other in zip(pairs[way]["seconds"], plain, strict=True)]
    return float(statistics.median(more) / statistics.median(plain))


def _row(name: str, measured: dict[str, Any], least: dict[str, Any] | None) -> list[str]:
    ways = measured["ways"]
    kvirt, limit, loop = ways["check-pid"], ways.get("limit"), ways.get("loop")
    further = ""
    if least is not None and least is not measured:
        few = least["ways"]["check-pid"]
        seconds = statistics.median(kvirt["seconds"]) - statistics.median(few["seconds"])
        # What is less than half of it is lost in the noise.
        if seconds > statistics.median(few["seconds"]) / 2:
            further = f"{(kvirt['pages'] - few['pages']) / seconds / 1e6:.3g}"
    return [
        name,
        f"{statistics.median(kvirt['seconds']) * 1000:.1f}",
        _millions(kvirt),
        further,
        _millions(kvirt, "walk"),
        "" if limit is None else _millions(limit),
        *("" if limit is None else f"{rate(kvirt, part) / rate(limit):.0%}" for part in ("walk", "seconds")),
        "" if loop is None else f"{rate(loop) / 1e6:.3g}",
        "" if loop is None else f"{rate(kvirt) / rate(loop):.0f} x",
        f"{measured['added_kib'] / KI:.0f}",
    ]


def _growth(memory: Memory, measured: dict[str, Any], one: dict[str, Any] | None) -> list[str]:
    """A row for processes of the same size.

    :param one: what was measured of one of them; None for itself
    """
    taken = measured["ways"]["check-pid"]
    beside = "" if one is None else f"{rate(taken) / rate(one['ways']['check-pid']) - 1:+.0%}"
    return [
        f"{memory.shape} {size(memory.pages)}",
        str(memory.processes),
        f"{statistics.median(taken['seconds']) * 1000:.1f}",
        _millions(taken),
        beside,
        f"{measured['added_kib'] / KI:.0f}",
    ]


def _show(document: dict[str, Any], rows: list[list[str]], show: Show) -> None:
    headers = ["pages", "ms", "all", "further", "walk", "limit", "walk of limit", "all of limit"]
    headers += ["loop", "all of loop", "MiB"]
    show("check-pid of one process, from an ELF core (millions of pages a second)", rows, headers)
    rows = []
    for name, measured in document.items():
        ways = measured["ways"]
        took = {way: statistics.median(taken["seconds"]) for way, taken in ways.items()}
        if "pairs" in measured:
            for way in ("progress", "rereading", "again"):
                rows.append([f"check-pid, {name}: {way}", f"{_added(measured['pairs'], way):+.1%}"])
        if "check-all" in ways:
            rows.append([f"check-all, {ways['check-all']['pages']:,} pages", f"{took['check-all']:.2f} s"])
            rows.append(["before: symbols and layout", f"{measured['opened']:.2f} s"])
        if "inflate" in ways and "kdump-zlib" in document:
            zlib = document["kdump-zlib"]["ways"]["check-pid"]
            whole = statistics.median(zlib["seconds"])
            rows.append(["kdump-compressed (zlib) core, the same pages", f"{_millions(zlib)} M pages/s"])
            rows.append(["of it decompression", f"{took['inflate'] / whole:.0%} of {whole * 1000:.0f} ms"])
    show("Other costs", rows, ["", "median"])
