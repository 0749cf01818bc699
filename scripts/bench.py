# SPDX-License-Identifier: GPL-2.0-only
"""Measures kvirt beside others: always both in one run, on the same guest.

Prints tables, and writes the same numbers to a JSON file.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import click
from tabulate import tabulate

from kvirt.errors import KvirtError
from kvirt.lab.bench.commands import measure_commands
from kvirt.lab.bench.dumps import measure_pages
from kvirt.lab.bench.running import measure_running
from kvirt.lab.bench.vmas import measure_vmas
from kvirt.lab.guest import Guest, GuestError
from kvirt.lab.kernels import get_kernel
from kvirt.lab.progress import TerminalReport, step

MODERN, LEGACY = "7.3", "6.12"
LIFETIME = 3600
PATIENCE = 300
KINDS = ("copy-vma", "split-vma", "rmap", "fault")
TRACERS = ("bare", "empty", "kvirt", "bpftrace")
# Starts of each way of tracing; one with kernel headers takes a minute without KVM.
STARTS = 3
EVENTS = {"copy-vma": 2000, "split-vma": 500, "rmap": 2000, "fault": 4000}
PYTHON = ["python3", "-m"]
# Addresses are not randomised: the emulator would translate the compiler anew for each process that has it at
# another address, and on a machine that runs the code itself there is no such cost.
SAME_ADDRESSES = ["setarch", "-R"]
# Those that boot guests of their own.
OWN = {"commands": measure_commands, "vmas": measure_vmas, "pages": measure_pages, "live": measure_running}
PARTS = (*OWN, "hits", "start", "overhead")

# Headers are folded, for most are wider than what is below them.
HEADER_WIDTH = 14


def show(title, rows, headers):
    """Print a table."""
    table = tabulate(rows, headers, tablefmt="simple", disable_numparse=True, maxheadercolwidths=HEADER_WIDTH)
    click.echo(f"\n{title}\n\n{table}")


def trace_reclaim(guest):
    """Trace the workload under reclaim; return the document of what was counted."""
    workload = [*PYTHON, "kvirt.lab.bench.reclaim"]
    argv = ["kvirt", "trace", "rmap", "--format", "json", "--", *workload]
    done = guest.run(argv, timeout=PATIENCE, check=True)
    # The workload says on the same stdout what it did.
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def hit_rates(guests, report):
    """The fast path's hit rate of one workload, side by side."""
    documents = {}
    for name, guest in guests.items():
        with step(report, f"Reclaim of many processes on Linux {name}", name):
            documents[name] = trace_reclaim(guest)["rmap"]
    rows = []
    for name, rmap in documents.items():
        hit, fallback = rmap["steps"]["hit"], rmap["steps"]["fallback"]
        walks = rmap["walks"]
        rows.append(
            [
                name,
                f"{hit / (hit + fallback):.1%}",
                hit,
                fallback,
                *(walks[kind] for kind in ("all_hit", "mixed", "all_fallback")),
            ]
        )
    headers = ["Linux", "fast path hits", "hit", "fallback", "walks all hit", "mixed", "all fallback"]
    show("rmap walks: copied pages of private file mappings, many processes, under reclaim", rows, headers)
    reasons = sorted({reason for rmap in documents.values() for reason, n in rmap["reasons"].items() if n})
    rows = [[reason, *(rmap["reasons"][reason] for rmap in documents.values())] for reason in reasons]
    show("Why steps fell back", rows, ["reason", *documents])
    return documents


def time_to_first(guest, argv):
    """Seconds from the start of a command to its first line."""
    began = time.monotonic()
    process = guest.popen(argv)
    process.close_stdin()
    if not process.readline(PATIENCE):
        raise GuestError(f"{argv} printed nothing.", process.stderr_text())
    took = time.monotonic() - began
    if process.wait(PATIENCE) not in (0, 3):
        raise GuestError(f"{argv} failed.", process.stderr_text())
    return took


def start_up(guest, rounds, report):
    """From start to first count, beside the same probes written with kernel headers."""
    ways = {
        "kvirt trace": [*SAME_ADDRESSES, "kvirt", "trace", "--format", "json", "0.1", "1"],
        "with kernel headers": [*SAME_ADDRESSES, *PYTHON, "kvirt.lab.bench.headers"],
    }
    seconds = {name: [] for name in ways}
    with step(report, f"Starting to trace, {rounds} rounds", "start-up"):
        # Once before, so that neither pays for reading the compiler from the disk.
        time_to_first(guest, ways["kvirt trace"])
        for _ in range(rounds):
            for name, argv in ways.items():
                seconds[name].append(time_to_first(guest, argv))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = medians["kvirt trace"]
    rows = [
        [
            name,
            f"{median:.1f}",
            f"{min(seconds[name]):.1f}",
            f"{max(seconds[name]):.1f}",
            f"{median / first:.1f} x",
        ]
        for name, median in medians.items()
    ]
    show("From start to first count (setarch -R)", rows, ["", "median s", "fastest", "slowest", ""])
    return seconds


def measure(guest, kind, tracer, rounds):
    """Nanoseconds an event takes, some rounds, under a tracer."""
    tracing = guest.popen([*PYTHON, "kvirt.lab.bench.tracers", tracer, kind])
    if tracing.readline(PATIENCE).strip() != "ready":
        raise GuestError(f"The tracer {tracer} did not start.", tracing.stderr_text())
    events = guest.popen([*PYTHON, "kvirt.lab.bench.events", kind, str(EVENTS[kind])])
    if events.readline(PATIENCE).strip() != "ready":
        raise GuestError(f"The events {kind} did not start.", events.stderr_text())
    seen = []
    for _ in range(rounds):
        events.write(b"\n")
        seen.append(float(events.readline(PATIENCE)))
    for process in (events, tracing):
        process.close_stdin()
        process.wait(PATIENCE)
    return seen


def overhead(guest, rounds, report):
    """What tracing adds to one event, beside an empty probe and bpftrace."""
    seen = {}
    rows = []
    for kind in KINDS:
        with step(report, f"Tracing {kind}, {rounds} rounds each", "overhead") as detail:
            seen[kind] = {}
            for tracer in TRACERS:
                detail(tracer)
                seen[kind][tracer] = measure(guest, kind, tracer, rounds)
        # The fastest: whatever else runs, on the host too, can only add to it.
        fastest = {tracer: min(values) for tracer, values in seen[kind].items()}
        extra = {tracer: fastest[tracer] - fastest["bare"] for tracer in TRACERS}
        rows.append(
            [
                kind,
                f"{fastest['bare'] / 1000:.1f}",
                *(f"{extra[tracer] / 1000:.1f}" for tracer in TRACERS[1:]),
                ratio(extra["kvirt"], extra["empty"]),
                ratio(extra["kvirt"], extra["bpftrace"]),
                f"{fastest['kvirt'] / fastest['bare']:.2f}",
            ]
        )
    added = [f"{tracer} +us" for tracer in TRACERS[1:]]
    headers = ["event", "bare us", *added, "kvirt/empty", "kvirt/bpftrace", "traced/bare"]
    show(f"What tracing adds to one event (fastest of {rounds} rounds)", rows, headers)
    return seen


def ratio(one, other):
    """How many times the other; what is lost in the noise has none."""
    return f"{one / other:.2f}" if other > 0 and one > 0 else "noise"


def trace(guest, parts, rounds, report, document):
    """The parts about tracing."""
    if "hits" in parts:
        with Guest(get_kernel(LEGACY, report), timeout=LIFETIME, report=report) as legacy:
            document["hits"] = hit_rates({LEGACY: legacy, MODERN: guest}, report)
    if "start" in parts:
        document["start"] = start_up(guest, STARTS, report)
    if "overhead" in parts:
        document["overhead"] = overhead(guest, rounds, report)


@click.command(help=__doc__)
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--rounds", default=20, show_default=True, help="Measurements of each event.")
@click.option("--looks", default=5, show_default=True, help="Times that a dump is looked at.")
@click.option(
    "--json", "file", type=click.Path(path_type=Path), default=Path("bench.json"), show_default=True
)
def main(parts, rounds, looks, file):
    """Run the benchmarks."""
    report = TerminalReport()
    parts = set(parts or PARTS)
    document = {"schema": "kvirt.bench/1", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    for part, measure_part in OWN.items():
        if part in parts:
            document[part] = measure_part(get_kernel(MODERN, report), looks, report, show)
    if parts - set(OWN):
        with Guest(get_kernel(MODERN, report), timeout=LIFETIME, report=report) as guest:
            trace(guest, parts, rounds, report, document)
    file.write_text(json.dumps(document, indent=2) + "\n")
    click.echo(f"\nThe same numbers are in {file}.")


if __name__ == "__main__":
    try:
        main()
    except KvirtError as error:
        sys.exit(f"bench: {error}")
