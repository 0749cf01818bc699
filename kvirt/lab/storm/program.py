# SPDX-License-Identifier: GPL-2.0-only
"""The storm's command line: starts workers, counts what they do, and sums up when they have ended."""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import time
from functools import partial
from typing import Any

from kvirt.lab.storm import machine
from kvirt.lab.storm.processes import NAMES, Account, Budget, act, end, fork_wide, start
from kvirt.lab.workload import syscalls as sc

WORKERS = 3
# Processes beside the workers.
OTHERS = 5
# Seconds between two compactions.
COMPACTION = 1.0
# What kernels came to know lately, and one without it refuses as what it does not know.
LATE = {"madvise GUARD_INSTALL", "madvise GUARD_REMOVE"}


def main(argv: list[str]) -> int:
    """Run the storm and return its exit status."""
    options = _parser().parse_args(argv)
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    # Who loses its parent in the storm gets this process for one, which reaps it.
    sc.prctl(sc.PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with machine.prepared() as lacks:
        print(json.dumps({"ready": {"pid": os.getpid(), "seed": seed}}), flush=True)
        storm = Storm(options.workers, options.others, seed)
        try:
            storm.blow(options.seconds)
        finally:
            storm.stop()
        summary = storm.summary(lacks)
    print(json.dumps(summary), flush=True)
    return 1 if summary["failures"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m kvirt.lab.storm",
        description="Map, move, split, merge, swap, share, collapse and fork memory at random on all "
        "processors, until stdin ends. Prints what was done as JSON; the exit status is 1 if an operation "
        "was never done. Needs root and changes settings of the machine until it ends: use a guest.",
    )
    parser.add_argument("--seed", type=int, help="the same seed draws the same operations")
    parser.add_argument("--seconds", type=float, help="end after this time, whether stdin has ended or not")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"processes that last ({WORKERS})")
    parser.add_argument("--others", type=int, default=OTHERS, help=f"their descendants at a time ({OTHERS})")
    return parser


class Storm:
    """Workers that do operations at random, and the account of it."""

    def __init__(self, workers: int, others: int, seed: int) -> None:
        self.failures: list[str] = []
        self.seed = seed
        self._account = Account()
        self._budget = Budget(others)
        self._counters = machine.Counters()
        self._started = time.monotonic()
        self._workers: list[int] = []
        self._workers.append(start(partial(fork_wide, self._account)))
        for number in range(workers):
            randoms = (random.Random(f"{seed}/{number}/{what}") for what in ("operations", "faults"))
            self._workers.append(start(partial(act, self._account, self._budget, *randoms)))

    def blow(self, seconds: float | None) -> None:
        """Count until stdin ends, or that many seconds are over, or a worker fails."""
        next_compaction = 0.0
        while not self.failures and (seconds is None or time.monotonic() - self._started < seconds):
            ready = select.select([sys.stdin, self._account.reader], [], [], 0.1)[0]
            if sys.stdin in ready and not os.read(sys.stdin.fileno(), 4096):
                return
            self._account.read()
            self._reap()
            self._counters.sample()
            if time.monotonic() > next_compaction:
                machine.compact()
                next_compaction = time.monotonic() + COMPACTION

    def _reap(self) -> None:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            if pid in self._workers:
                code = os.waitstatus_to_exitcode(status)
                how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                self.failures.append(
                    f"A worker ended by itself ({how}): see its stderr and the kernel's log."
                )
                return
            self._budget.give_back()

    def stop(self) -> None:
        """End everything that was started."""
        end(self._workers)
        self._account.read()

    def summary(self, lacks: list[str]) -> dict[str, Any]:
        """What was done, and what was not that should have been."""
        account, grown = self._account, self._counters.grown()
        missing = account.missing()
        absent = {
            name: why for name, why in missing.items() if name in LATE and set(why.split()[::3]) == {"EINVAL"}
        }
        failures = [*self.failures, *lacks]
        failures += [f"{name} was never done: {why}." for name, why in missing.items() if name not in absent]
        failures += [
            f"{name} of /proc/vmstat did not grow." for name in machine.MUST_GROW if not grown.get(name)
        ]
        return {
            "seed": self.seed,
            "seconds": round(time.monotonic() - self._started, 1),
            "operations": {name: [account.done[name], account.refused[name].total()] for name in NAMES},
            "absent": absent,
            "kernel": grown,
            "failures": failures,
        }
