# SPDX-License-Identifier: GPL-2.0-only
"""Checks whole machines again and again while a storm of operations on memory goes on in them.

For each kernel a guest is booted. While the storm goes on in it, the whole machine is checked from outside,
which runs at the host's speed, then from inside, and then some dumps of it are. No check may find an error.
"""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
from tabulate import tabulate

from kvirt.errors import KvirtError
from kvirt.lab.guest import Guest
from kvirt.lab.kernels import get_kernel
from kvirt.lab.progress import TerminalReport, step
from kvirt.lab.storm import run

KERNELS = ("7.3", "6.12")
LIFETIME = 7200


SEVERITIES = ("error", "warning", "info", "transient")
HEADERS = ["Linux", "checked", "rounds", "s each", "processes", "gone", "verified", *SEVERITIES, "incomplete"]


class Seen:
    """What rounds of one kind gave; shows how far they are."""

    def __init__(self, report, kernel, how, rounds):
        self.report, self.kernel, self.how, self.rounds = report, kernel, how, rounds
        self.seconds = []
        self.processes = self.gone = 0
        self.pages = Counter()
        self.findings = Counter()
        self.incomplete = Counter()
        self.errors = 0
        self.detail = lambda text: None

    def __call__(self, message):
        """Take a round."""
        self.seconds.append(message["seconds"])
        self.processes += message["processes"]
        self.gone += message["gone"]
        self.pages.update(message["pages"])
        for severity, ids in message["findings"].items():
            self.findings.update({(severity, id_): number for id_, number in ids.items()})
        self.incomplete.update(message["incomplete"])
        done = len(self.seconds)
        for error in message["errors"]:
            self.report(f"ERROR in round {done}: {error}")
        self.errors += len(message["errors"])
        text = f"round {done} of {self.rounds}, {message['processes']} processes"
        self.detail(text)
        if done % 50 == 0:
            self.report(f"  {text}, {self.errors} errors so far")

    def row(self):
        """Its row of the first closing table."""
        rounds, pages = len(self.seconds), self.pages.total()
        by_severity = Counter()
        for (severity, _), number in self.findings.items():
            by_severity[severity] += number
        return [
            self.kernel,
            self.how,
            rounds,
            f"{sum(self.seconds) / rounds:.2f}",
            self.processes,
            self.gone,
            f"{self.pages['verified'] / pages:.1%}" if pages else "-",
            *(by_severity[severity] for severity in SEVERITIES),
            self.incomplete.total(),
        ]


def blow(pattern, rounds, inside, dumps, seed, report):
    """Have a storm in one guest; return what was seen and the storm's summary."""
    with (
        Guest(get_kernel(pattern, report), timeout=LIFETIME, report=report) as guest,
        tempfile.TemporaryDirectory(prefix="kvirt-storm-") as directory,
    ):
        release = guest.kernel.release.partition("+")[0]
        outside = Seen(report, release, "from outside", rounds)
        within = Seen(report, release, "inside", inside)
        dead = Seen(report, release, "dumps", dumps)
        if inside:
            with step(report, "Opening the kernel inside the guest, which is slow without KVM", release):
                watcher = run.InsideWatcher(guest, inside)
        with run.storm(guest, *([] if seed is None else ["--seed", str(seed)])) as storm:
            title = f"Checking Linux {release} from outside in a storm, {rounds} rounds"
            with step(report, title, release) as outside.detail:
                run.watch_from_outside(guest, rounds, outside)
            if inside:
                title = f"Checking it inside the guest, {inside} rounds"
                with step(report, title, release) as within.detail:
                    watcher.watch(within)
            with step(report, f"Checking {dumps} dumps of it", release) as dead.detail:
                for _ in range(dumps):
                    dead(run.check_dump(guest, Path(directory)))
    return [seen for seen in (outside, within, dead) if seen.seconds], storm.summary


def show(rows, headers):
    """Print a table after a blank line."""
    click.echo("\n" + tabulate(rows, headers, tablefmt="simple", disable_numparse=True))


def sum_up(results):
    """Print the closing tables; return whether there was no error."""
    everything = [seen for seens, _ in results for seen in seens]
    show([seen.row() for seen in everything], HEADERS)
    names = [f"{seen.kernel} {seen.how}" for seen in everything]
    found = sorted({key for seen in everything for key in seen.findings})
    show([[*key, *(seen.findings[key] for seen in everything)] for key in found], ["", "", *names])
    click.echo()
    for sentence, number in sum((seen.incomplete for seen in everything), Counter()).most_common():
        click.echo(f"{number} times: {sentence}")
    kernels = [seens[0].kernel for seens, _ in results]
    storms = [summary for _, summary in results]
    rows = [[name, *(_counts(storm, name) for storm in storms)] for name in storms[0]["operations"]]
    show(rows, ["operation: done, refused", *kernels])
    rows = [[name, *(storm["kernel"].get(name, "-") for storm in storms)] for name in storms[0]["kernel"]]
    show(rows, ["counted by the kernel", *kernels])
    return not any(seen.errors for seen in everything)


def _counts(storm, name):
    done, refused = storm["operations"][name]
    return f"{done}, {refused}"


@click.command(help=__doc__)
@click.option("--kernel", "kernels", multiple=True, default=KERNELS, show_default=True, help="What to boot.")
@click.option("--rounds", default=200, show_default=True, help="Checks of the whole machine from outside.")
@click.option("--inside", default=5, show_default=True, help="The same inside the guest.")
@click.option("--dumps", default=3, show_default=True, help="Dumps to take and check.")
@click.option("--seed", type=int, help="Draws the same operations again.")
def main(kernels, rounds, inside, dumps, seed):
    """Have a storm on each kernel, and sum up; the exit status is 0 only without errors."""
    started = time.monotonic()
    report = TerminalReport()
    try:
        clean = sum_up([blow(kernel, rounds, inside, dumps, seed, report) for kernel in kernels])
    except KvirtError as error:
        click.echo(f"storm: {error}", err=True)
        sys.exit(1)
    click.echo(f"\nAll of it took {(time.monotonic() - started) / 60:.0f} minutes.")
    if not clean:
        click.echo("storm: healthy kernels were accused: see the errors above.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
