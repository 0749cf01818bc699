# SPDX-License-Identifier: GPL-2.0-only
"""Checks one process of a real kernel in three ways, then shows what a broken page looks like.

The process is the lab's workload, which has its memory in every state that page offsets can be in. It is
checked from inside the guest, from outside while the guest runs, and in a vmcore: the verdict has to be
the same. A vmcore on which one page's index is changed has to be found inconsistent.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from tabulate import tabulate

from kvirt.errors import KvirtError
from kvirt.lab import defaults
from kvirt.lab.guest import Guest
from kvirt.lab.kernels import get_kernel
from kvirt.lab.progress import TerminalReport, step

# Lines of a table that are shown.
HEAD = 16
WIDTH = 110
# Seconds for a command in a guest without KVM on a busy host.
PATIENCE = 300
# The page that a finding names.
MADE_UP = re.compile(r"FOLIO-INDEX at (0x[0-9a-f]+)")


class Unexpected(Exception):
    """A step did not give what the demonstration promises."""


def say(text):
    """Print a heading."""
    click.secho(f"\n{text}", bold=True)


def show(argv, output, head=HEAD, prompt="$"):
    """Print a command and the beginning of what it printed."""
    click.secho(f"{prompt} {shlex.join(argv)}", fg="green")
    lines = output.splitlines()
    for line in lines[:head]:
        click.echo(line[:WIDTH])
    if len(lines) > head:
        click.echo(f"... ({len(lines) - head} more lines)")


def on_host(*argv, status=0, quiet=False):
    """Run kvirt on this machine, show it unless ``quiet``, and return its stdout."""
    words = ["kvirt", *map(str, argv)]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    if not quiet:
        show(words, done.stderr + done.stdout)
    expect(done.returncode == status, f"exit status {done.returncode}, not {status}: {done.stderr}")
    return done.stdout


def in_guest(guest, report, *argv):
    """Run kvirt in the guest, show it, and return its stdout."""
    words = ["kvirt", *map(str, argv)]
    with step(report, "Loading the kernel's types in the guest, which is slow without KVM", "check"):
        done = guest.run(["env", f"COLUMNS={WIDTH}", *words], timeout=PATIENCE)
    show(words, done.stderr + done.stdout, prompt="guest#")
    expect(done.returncode == 0, f"exit status {done.returncode}, not 0: {done.stderr}")
    return done.stdout


def expect(condition, otherwise):
    """Give up unless the condition holds."""
    if not condition:
        raise Unexpected(otherwise.strip())


def said(output):
    """Return what has to be the same however the process is read: all but the line that says how."""
    first, _, *rest = output.splitlines()
    return [first, *rest]


def demonstrate(guest, directory):
    """Go through the steps; raise :class:`Unexpected` if one gives something else."""
    report = TerminalReport()
    vmlinux = guest.kernel.vmlinux
    say(f"A guest runs Linux {guest.kernel.release} ({guest.accelerator}). The workload fills its memory.")
    click.secho("guest# kvirt lab workload &", fg="green")
    with step(report, "Waiting for the workload", "workload"):
        workload = guest.popen(["kvirt", "lab", "workload"])
        line = workload.readline(PATIENCE)
    expect(line, f"the workload failed: {workload.stderr_text()}")
    document = json.loads(line)
    pid = document["pid"]
    click.echo(f"PID {pid}: {len(document['regions'])} regions with known page offsets")

    say("1. Live, inside the guest")
    live = in_guest(guest, report, "check-pid", pid)

    say("2. From outside, while the guest runs")
    running = on_host("--qemu", guest.qmp_socket, "-s", vmlinux, "check-pid", pid)

    say("3. A vmcore, on the host")
    core = guest.dump(directory / "vmcore")
    dead = on_host("-c", core, "-s", vmlinux, "check-pid", pid)

    say("4. The same vmcore, read through an overlay in which one folio's index is wrong")
    damaged = ["-c", core, "-s", vmlinux, "lab", "damage", "FOLIO-INDEX", pid]
    broken = on_host(*damaged, status=1)
    address = MADE_UP.search(broken)
    expect(address, "the finding names no page")
    at = address[1]
    again = json.loads(on_host(*damaged, "--at", at, "--format", "json", status=1, quiet=True))
    found = [(f["id"], f["address"]) for f in again["findings"] if f["severity"] == "error"]
    expect(found == [("FOLIO-INDEX", at)], f"found {found}, and the page at {at} was damaged")

    workload.close_stdin()
    expect(workload.wait(PATIENCE) == 0, "the workload did not end well")
    readings = {"live, in the guest": live, "running, from outside": running, "vmcore": dead}
    say("What was seen")
    rows = [[name, said(text)[0]] for name, text in readings.items()]
    rows.append(["vmcore, damaged", said(broken)[0]])
    click.echo(tabulate(rows, tablefmt="plain"))
    different = [name for name, text in readings.items() if said(text) != said(live)]
    expect(not different, f"these readings differ from the live one: {', '.join(different)}")
    expect(live.startswith("CONSISTENT"), "a healthy process has errors")
    click.echo(
        "The three readings are the same to the letter, offsets of all VMAs included.\n"
        f"The one page that was made wrong, at {at}, was found, and nothing else."
    )


def main():
    """Boot, demonstrate, sum up; the exit status is 0 only if all was as expected."""
    os.environ["COLUMNS"] = str(WIDTH)
    # As Ctrl-C does, so that the guest is ended and the vmcore removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    started = time.monotonic()
    report = TerminalReport()
    try:
        with (
            Guest(get_kernel(defaults.KERNEL, report), report=report) as guest,
            tempfile.TemporaryDirectory(prefix="kvirt-demo-") as directory,
        ):
            demonstrate(guest, Path(directory))
    except (Unexpected, KvirtError) as error:
        click.echo(f"demo: {error}", err=True)
        return 1
    except KeyboardInterrupt:
        return 130
    click.echo(f"All of it took {time.monotonic() - started:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
