# SPDX-License-Identifier: GPL-2.0-only
"""Tries kvirt on each kernel: running and as a dump, by debug information and without, checking and tracing.

For each kernel a guest is booted, with the workload in it, which has its memory in every state that page
offsets can be in. What is read of it without debug information has to be the same as with it.
"""

import json
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import click
from tabulate import tabulate

from kvirt.errors import KvirtError
from kvirt.lab.guest import Guest
from kvirt.lab.kernels import get_kernel
from kvirt.lab.progress import TerminalReport, step

KERNELS = ("7.3", "7.2", "6.12", "6.1")
TYPES = ("dwarf", "btf")
HEADERS = ["Linux", "scheme", "target", "types", "check-all", "trace"]
LIFETIME = 3600
# Seconds for a command in a guest without KVM on a busy host.
PATIENCE = 900
# Mappings that are moved while they are traced.
MOVES = 100
DOES_NOT_APPLY = {
    "dwarf": "`kvirt trace` learns what it needs from BTF alone: it has to start quickly, on any machine.",
    "core": "Only what runs can be traced: a dump is dead.",
}


class Matrix:
    """What was tried, and what came of it."""

    def __init__(self):
        self.rows = []
        self.notes = []
        self.failed = False

    def fail(self, where, why):
        """Take down a failure; return what its cell says."""
        self.failed = True
        self.notes.append(f"{where}: {why}")
        return "FAIL"

    def judge(self, where, status, stdout, stderr):
        """Say what a check's document amounts to, and return it."""
        if status not in (0, 3):
            reason = stderr.strip().splitlines()[-1:] or [f"{json.loads(stdout)['summary']['error']} errors"]
            return self.fail(where, f"exit status {status}, {reason[0]}"), None
        document = json.loads(stdout)
        pages = document["totals"]["pages"]
        cell = f"pass: {document['totals']['processes']} processes, {pages['anon']:,} pages"
        if status == 3:
            cell = cell.replace("pass", "no error")
            self.notes += [f"{where}: {sentence}" for sentence in document["incomplete"]]
        return cell, document


def same(document, other):
    """Whether two documents are the same but for where types were from."""
    return all(value == other[key] for key, value in document.items() if key != "target")


def of_process(document, pid):
    """What a document says of one process."""
    return next(task for task in document["tasks"] if task["pid"] == pid)


def trace(matrix, where, guest):
    """Trace a known number of copied VMAs; return the cell."""
    # It does so many in advance, and more only for lines on its stdin, where there are none.
    event = f"python3 -m kvirt.lab.bench.events copy-vma {MOVES} >/dev/null"
    done = guest.run(["kvirt", "trace", "--format", "json", "--", "sh", "-c", event], PATIENCE)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["no word of why"]
        return matrix.fail(where, f"exit status {done.returncode}, {said[0]}")
    document = json.loads(done.stdout.splitlines()[-1])
    copies = sum(document["copy_vma"][name] or 0 for name in ("hit", "fallback"))
    absent = {name: state for name, state in document["probes"].items() if state != "attached"}
    matrix.notes += [f"{where}: {name}: {state}" for name, state in absent.items()]
    if copies != MOVES:
        return matrix.fail(where, f"{copies} copies of VMAs were counted, and there were {MOVES}")
    return f"pass: {copies} of {MOVES} copies"


def try_kernel(matrix, pattern, report):
    """Fill in the rows of one kernel."""
    with (
        Guest(get_kernel(pattern, report), timeout=LIFETIME, report=report) as guest,
        tempfile.TemporaryDirectory(prefix="kvirt-matrix-") as directory,
    ):
        release = re.sub(r"[+-][^\d].*", "", guest.kernel.release)
        with step(report, "Waiting for the workload", release):
            workload = guest.popen(["kvirt", "lab", "workload", "--with", "hugetlb,ksm,swap"])
            line = workload.readline(PATIENCE)
        if not line:
            raise KvirtError(f"The workload failed in the guest: {workload.stderr_text()}")
        pid = json.loads(line)["pid"]
        documents = {}

        def row(target, types, done, traced):
            where = f"{release}, {target}, {types}"
            cell, document = matrix.judge(where, done.returncode, done.stdout, done.stderr)
            documents[target, types] = document
            scheme = document["kernel"]["scheme"] if document else "-"
            matrix.rows.append([release, scheme, target, types, cell, traced(where)])

        for types in TYPES:
            argv = ["kvirt", "--types", types, "check-all", "--format", "json"]
            with step(report, f"Checking Linux {release} inside the guest, by {types.upper()}", release):
                done = guest.run(argv, PATIENCE)
            if types == "dwarf":
                row("live", types, done, lambda where: "does not apply (1)")
            else:
                with step(report, "Tracing it", release):
                    row("live", types, done, lambda where: trace(matrix, where, guest))
        core = guest.dump(Path(directory) / "vmcore")
        for types in TYPES:
            argv = ["-c", str(core), "--types", types, "check-all", "--format", "json"]
            if types == "dwarf":
                argv = ["-s", str(guest.kernel.vmlinux), *argv]
            with step(report, f"Checking a dump of it, by {types.upper()}", release):
                done = subprocess.run(
                    [sys.executable, "-m", "kvirt", *argv],
                    capture_output=True,
                    text=True,
                    check=False,
                )
            row("core", types, done, lambda where: "does not apply (2)")
        by_dwarf, by_btf = documents["core", "dwarf"], documents["core", "btf"]
        if by_dwarf and by_btf and not same(by_dwarf, by_btf):
            matrix.fail(f"{release}, core", "what DWARF and BTF give is not the same")
        by_dwarf, by_btf = documents["live", "dwarf"], documents["live", "btf"]
        # Of a running machine, what stands still.
        if by_dwarf and by_btf and of_process(by_dwarf, pid)["vmas"] != of_process(by_btf, pid)["vmas"]:
            matrix.fail(f"{release}, live", "the workload's VMAs by DWARF and by BTF are not the same")


@click.command(help=__doc__)
@click.option("--kernel", "kernels", multiple=True, default=KERNELS, show_default=True, help="What to boot.")
def main(kernels):
    """Fill the matrix; the exit status is 0 only if nothing failed."""
    started = time.monotonic()
    report = TerminalReport()
    matrix = Matrix()
    for kernel in kernels:
        try:
            try_kernel(matrix, kernel, report)
        except KvirtError as error:
            matrix.fail(kernel, str(error))
    click.echo(f"{time.strftime('%Y-%m-%d')}\n")
    click.echo(tabulate(matrix.rows, HEADERS, tablefmt="simple", disable_numparse=True))
    click.echo()
    for number, sentence in enumerate(DOES_NOT_APPLY.values(), 1):
        click.echo(f"({number}) {sentence}")
    for note in dict.fromkeys(matrix.notes):
        click.echo(textwrap.fill(note, 100, subsequent_indent="  "))
    click.echo(f"All of it took {(time.monotonic() - started) / 60:.0f} minutes.")
    sys.exit(matrix.failed)


if __name__ == "__main__":
    main()
