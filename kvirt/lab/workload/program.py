# SPDX-License-Identifier: GPL-2.0-only
"""The workload's command line, its processes together, and the check against /proc."""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from kvirt.lab.procfs import (
    PAGE_SHIFT,
    PM_FILE,
    PM_PRESENT,
    PM_SWAPPED,
    Mapping,
    read_maps,
    read_pagemap,
    setting_in_force,
)
from kvirt.lab.workload import syscalls as sc
from kvirt.lab.workload.children import BARE, BARE_OPTIONAL, HEIRS, LARGE, MERGE_PATIENCE, RECLAIM
from kvirt.lab.workload.process import PATIENCE, NotReached, Process, Skip
from kvirt.lab.workload.regions import FILE_BACKED, expand
from kvirt.lab.workload.states import OPTIONAL, STATES, build
from kvirt.lab.workload.swaparea import SwapArea

SCHEMA = "kvirt.workload/1"
KSM = Path("/sys/kernel/mm/ksm")
NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")

Entry = dict[str, Any]


def main(argv: list[str]) -> int:
    """Run the workload and return its exit status."""
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    workload = Workload()
    try:
        document = workload.start(options.optional)
        print(pretty(document) if options.pretty else json.dumps(document), flush=True)
        if not options.once:
            _wait_for_end_of_stdin()
    except NotReached as error:
        print(f"kvirt lab workload: {error}", file=sys.stderr)
        return 1
    except (Terminated, KeyboardInterrupt):
        return 0
    except BrokenPipeError:
        # The reader has seen enough. Python would complain once more while it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        workload.stop()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvirt lab workload",
        description="Put memory into every state a page offset can be in, print which as JSON, and "
        "hold it until stdin ends or SIGTERM comes.",
    )
    parser.add_argument("--pretty", action="store_true", help="print a table, not JSON")
    parser.add_argument("--once", action="store_true", help="build, check, print and end")
    parser.add_argument(
        "--with",
        dest="optional",
        type=_optional_names,
        default=[],
        metavar="NAME,...",
        help=f"also what changes settings of the machine until the end: {', '.join(OPTIONAL)}",
    )
    return parser


def _optional_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in OPTIONAL:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(OPTIONAL)}")
    return names


class Terminated(BaseException):
    """SIGTERM came."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _wait_for_end_of_stdin() -> None:
    while os.read(0, 65536):
        pass


class Workload:
    """All processes of one run."""

    def __init__(self) -> None:
        self.processes: list[Entry] = []
        self.regions: list[Entry] = []
        self.skipped: list[Entry] = []
        self._life_end = -1
        self._undo: list[tuple[str, Callable[[], object]]] = []
        self._stop_at: list[int] = []

    def start(self, optional: list[str]) -> Entry:
        """Build everything, check it, and return the document."""
        # Whoever loses its parent within the workload gets this process for one.
        sc.prctl(sc.PR_SET_CHILD_SUBREAPER, 1)
        scheme = kernel_scheme()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        life, self._life_end = os.pipe()
        main_process = Process(
            "main",
            "The states that need no second process.",
            scheme,
            theirs,
            (life, self._life_end),
        )
        prepared = [name for name in optional if self._prepare(name)]
        for start in BARE.values():
            start(main_process)
        for start, needed in BARE_OPTIONAL.values():
            if needed <= set(prepared):
                start(main_process)
        build(main_process, STATES)
        for name in prepared:
            build(main_process, {name: OPTIONAL[name]})
        if "ksm" in prepared:
            self._merge(main_process)
        for start in HEIRS.values():
            start(main_process)
        for message in main_process.messages():
            self._take(message)
        theirs.close()
        self._collect(ours, main_process.children)
        if "ksm" in prepared:
            # What is merged stays so; scanning on would take a processor for as long as this stands.
            (KSM / "run").write_text("0")
        check(self.regions, scheme)
        return {
            "schema": SCHEMA,
            "kernel": os.uname().release,
            "scheme": scheme,
            "pid": main_process.pid,
            "processes": self.processes,
            "regions": self.regions,
            "skipped": self.skipped,
        }

    def _take(self, message: Entry) -> None:
        for key, entries in (
            ("process", self.processes),
            ("region", self.regions),
            ("skipped", self.skipped),
        ):
            if key in message:
                entries.append(message[key])

    def _collect(self, ours: socket.socket, expected: int) -> None:
        """Take the reports of all processes; each says how many more it started."""
        deadline = time.monotonic() + PATIENCE
        while expected:
            ready = select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                raise NotReached(f"After {PATIENCE:.0f} s {expected} processes had not reported.")
            data = ours.recv(1 << 20)
            if not data:
                raise NotReached(f"{expected} processes ended before they reported their states.")
            message = json.loads(data)
            if "error" in message:
                raise NotReached(message["error"])
            self._take(message)
            if "process" in message:
                expected += message["children"] - 1
        ours.close()

    def _prepare(self, name: str) -> bool:
        """Change the settings that an optional state needs; False if the machine has none of it."""
        try:
            if name == "hugetlb":
                self._set(NR_HUGEPAGES, str(int(NR_HUGEPAGES.read_text()) + 8))
            elif name == "ksm":
                for file, value in (("sleep_millisecs", "10"), ("pages_to_scan", "4000")):
                    self._set(KSM / file, value)
            elif name == "swap":
                if LARGE.exists():
                    self._set(LARGE, "madvise")
                area = SwapArea()
                self._undo.append((f"the swap area {area.path} is not gone", area.close))
                area.open()
                self._make_group()
        except OSError as error:
            reason = f"A setting of the machine cannot be changed: {error}."
            self.skipped.append({"name": f"main/{name}", "reason": reason})
            return False
        except Skip as reason:
            self.skipped.append({"name": f"main/{name}", "reason": str(reason)})
            return False
        return True

    def _make_group(self) -> None:
        """Make a cgroup whose memory can be reclaimed; a state that needs it looks for it."""
        control = RECLAIM.parents[1] / "cgroup.subtree_control"
        if not control.exists():
            return
        if "memory" not in control.read_text().split():
            control.write_text("+memory")
            self._undo.append((f"{control} still has memory", lambda: control.write_text("-memory")))
        RECLAIM.parent.mkdir(exist_ok=True)
        self._undo.append((f"{RECLAIM.parent} is still there", RECLAIM.parent.rmdir))

    def _merge(self, p: Process) -> None:
        """Have KSM merge what was written for it."""
        written = sum(len(r.written) for key, r in p.regions.items() if key.startswith("ksm/"))
        self._set(KSM / "run", "1")
        merging = Path("/proc/self/ksm_merging_pages")
        deadline = time.monotonic() + MERGE_PATIENCE
        while (merged := int(merging.read_text())) < written:
            if time.monotonic() > deadline:
                reason = f"In {MERGE_PATIENCE} s KSM merged {merged} pages of {written}, and no more."
                self.skipped.append({"name": "main/ksm", "reason": reason})
                return
            time.sleep(0.1)

    def _set(self, path: Path, value: str) -> None:
        before = setting_in_force(path.read_text())
        path.write_text(value)
        self._undo.append((f"{path} is not {before} again", lambda: path.write_text(before)))

    def stop(self) -> None:
        """End every child and restore every setting."""
        if self._life_end >= 0:
            os.close(self._life_end)
        deadline = time.monotonic() + 10
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                if time.monotonic() > deadline:
                    _kill_children()
                time.sleep(0.01)
        for failure, undo in reversed(self._undo):
            try:
                undo()
            except OSError as error:
                print(f"kvirt lab workload: {failure}: {error}", file=sys.stderr)


def _kill_children() -> None:
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        os.kill(int(pid), signal.SIGKILL)


def kernel_scheme(btf: Path = Path("/sys/kernel/btf/vmlinux")) -> str | None:
    """Tell by the kernel's BTF whether it has an anon pgoff: "anon", "legacy", or None if unknown.

    A member's name in the string table is enough here; kvirt itself looks closer.
    """
    try:
        strings = btf.read_bytes()
    except OSError:
        return None
    # Before it was merged in Linux 7.3 it was called virt pgoff.
    found = re.search(rb"\0(?:__)?vm_(?:anon|virt)_pgoff(?:_lo)?\0", strings)
    return "anon" if found else "legacy"


# The check against /proc


def check(regions: list[Entry], scheme: str | None) -> None:
    """Compare regions with what /proc says of their processes; raise NotReached if one differs."""
    mappings: dict[int, dict[int, Mapping]] = {}
    for region in regions:
        pid = region["pid"]
        try:
            if pid not in mappings:
                mappings[pid] = {m.start: m for m in read_maps(pid)}
            problem = next(_problems(region, mappings[pid], scheme), None)
        except OSError as error:
            problem = f"/proc/{pid} cannot be read: {error}"
        if problem is not None:
            raise NotReached(f"The region {region['name']} was not reached: {problem}.")


def _problems(region: Entry, mappings: dict[int, Mapping], scheme: str | None) -> Iterator[str]:
    start, end = int(region["start"], 16), int(region["end"], 16)
    mapping = mappings.get(start)
    if mapping is None:
        yield f"process {region['pid']} has no mapping that begins at {start:#x}"
        return
    if mapping.end != end:
        yield f"its mapping ends at {mapping.end:#x}, not at {end:#x}"
    perms = "".join(letter if letter in region["prot"] else "-" for letter in "rwx")
    perms += "s" if region["shared"] else "p"
    if mapping.perms != perms:
        yield f"its mapping has the permissions {mapping.perms}, not {perms}"
    yield from _offset_problems(region, mapping, scheme)
    yield from _page_problems(region, start, end)


def _offset_problems(region: Entry, mapping: Mapping, scheme: str | None) -> Iterator[str]:
    has_file = region["kind"] in FILE_BACKED
    if has_file != bool(mapping.inode):
        yield f"a mapping of the kind {region['kind']} {'has' if has_file else 'has no'} file"
    if not has_file:
        # No file, no offset: the kernel shows 0 whatever the VMA has.
        pgoff: str | None = "0x0"
    elif scheme == "anon":
        pgoff = region["vm_pgoff"]
    else:
        pgoff = region.get("legacy_vm_pgoff", region["vm_pgoff"])
    if pgoff is not None and mapping.offset != int(pgoff, 16) << PAGE_SHIFT:
        yield f"its mapping has the offset {mapping.offset:#x}, not page {pgoff}"


def _page_problems(region: Entry, start: int, end: int) -> Iterator[str]:
    wanted = {
        "written": ("an anonymous page", PM_PRESENT),
        "inherited": ("an anonymous page", PM_PRESENT),
        "zero": ("the zero page", PM_PRESENT),
        "read": ("a file page", PM_PRESENT | PM_FILE),
        "swapped": ("an entry of swap", PM_SWAPPED),
    }
    entries = read_pagemap(region["pid"], start, end)
    for key, (what, bits) in wanted.items():
        for address in expand(region.get(key, [])):
            entry = entries[(address - start) >> PAGE_SHIFT]
            if entry & (PM_PRESENT | PM_SWAPPED | PM_FILE) != bits:
                yield f"at {address:#x} there is not {what} (pagemap says {entry:#x})"


# For people


def pretty(document: Entry) -> str:
    """Return the document as text."""
    lines = [f"Linux {document['kernel']}, scheme {document['scheme'] or 'unknown'}"]
    for process in document["processes"]:
        regions = [r for r in document["regions"] if r["pid"] == process["pid"]]
        lines += ["", f"{process['name']} (pid {process['pid']}): {process['what']}"]
        if process["category"] == "warnings":
            lines.append("  Legal states that a checker may warn about.")
        lines.append(f"  {'START':>14} {'PAGES':>5} {'VM_PGOFF':>11} {'ANON_PGOFF':>11} {'ANON':>5} NAME")
        for region in regions:
            start, end = int(region["start"], 16), int(region["end"], 16)
            anon = len(expand(region["written"])) + len(expand(region.get("inherited", [])))
            lines.append(
                f"  {start:14x} {end - start >> PAGE_SHIFT:5} {region['vm_pgoff'] or '?':>11}"
                f" {region['anon_pgoff'] or '?':>11} {anon:5} {region['name'].partition('/')[2]}"
            )
    lines += [f"\nSkipped: {entry['name']}: {entry['reason']}" for entry in document["skipped"]]
    return "\n".join(lines)
