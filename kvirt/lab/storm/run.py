# SPDX-License-Identifier: GPL-2.0-only
"""A storm in a guest, seen from the host: the guest is watched meanwhile, or dumped."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvirt.lab.guest import Guest, GuestError, GuestProcess
from kvirt.lab.tree import TREE

# Seconds in which an emulated guest on a busy host opens its kernel, ends a storm, or checks itself once.
PATIENCE = 600.0

Round = dict[str, Any]
Seen = Callable[[Round], None]
WATCH = "kvirt.lab.storm.watch"


class StormError(GuestError):
    """A storm or its watcher did not do what it should: one sentence, then what it said."""


class Storm:
    """A storm that goes on until :meth:`stop`."""

    def __init__(self, guest: Guest, *arguments: str) -> None:
        self._process = guest.popen(["python3", "-m", "kvirt.lab.storm", *arguments])
        self._line("It did not begin")
        self.summary: dict[str, Any] = {}

    def stop(self) -> None:
        """End it, and take its summary.

        :raises StormError: if something went wrong in it, or an operation was never done
        """
        self._process.close_stdin()
        self.summary = self._line("It did not sum up")
        status = self._process.wait(PATIENCE)
        said = self._process.stderr_text()
        if status or said:
            failures = " ".join(self.summary["failures"])
            raise StormError(f"The storm ended with status {status}: {failures}", "\n" + said)

    def _line(self, otherwise: str) -> dict[str, Any]:
        line = self._process.readline(PATIENCE)
        if not line:
            raise StormError(f"The storm failed. {otherwise}:", "\n" + self._process.stderr_text())
        message: dict[str, Any] = json.loads(line)
        return message


@contextlib.contextmanager
def storm(guest: Guest, *arguments: str) -> Iterator[Storm]:
    """Have a storm in a guest while the block lasts; what it left undone is an error at the end."""
    blowing = Storm(guest, *arguments)
    try:
        yield blowing
    except BaseException:
        # That one matters more than how the storm ends.
        with contextlib.suppress(GuestError, TimeoutError):
            blowing.stop()
        raise
    blowing.stop()


class InsideWatcher:
    """Checks the guest from inside; opens its kernel at once, which is slow in a storm."""

    def __init__(self, guest: Guest, rounds: int) -> None:
        self._process: GuestProcess = guest.popen(["python3", "-m", WATCH, "--rounds", str(rounds)])
        self._line()

    def _line(self) -> Round:
        line = self._process.readline(PATIENCE)
        if not line:
            raise StormError("The watcher in the guest failed:", "\n" + self._process.stderr_text())
        message: Round = json.loads(line)
        return message

    def watch(self, seen: Seen) -> dict[str, Any]:
        """Check as often as was said; returns the summary."""
        self._process.write(b"\n")
        while "summary" not in (message := self._line()):
            seen(message)
        self._process.wait(PATIENCE)
        summary: dict[str, Any] = message["summary"]
        return summary


def watch_from_outside(guest: Guest, rounds: int, seen: Seen) -> dict[str, Any]:
    """Check the guest through QEMU, at the host's speed; returns the summary."""
    return _watch_on_host(guest, rounds, seen, "--qemu", guest.qmp_socket)


def check_dump(guest: Guest, directory: Path) -> Round:
    """Take a dump of the guest as it happens to be, check it once, and remove it."""
    path = directory / "vmcore"
    rounds: list[Round] = []
    try:
        _watch_on_host(guest, 1, rounds.append, "--core", guest.dump(path))
    finally:
        path.unlink(missing_ok=True)
    return rounds[0]


def _watch_on_host(guest: Guest, rounds: int, seen: Seen, *target: str | Path) -> dict[str, Any]:
    argv = [sys.executable, "-m", WATCH, "--rounds", rounds, "--symbols", guest.kernel.vmlinux, *target]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=TREE,
        )
        with process:
            assert process.stdin and process.stdout
            try:
                process.stdin.write("\n")
                process.stdin.flush()
                for line in process.stdout:
                    message = json.loads(line)
                    if "round" in message:
                        seen(message)
                    elif "summary" in message:
                        summary: dict[str, Any] = message["summary"]
                        return summary
            finally:
                process.kill()
        errors.seek(0)
        raise StormError("The watcher on the host failed:", "\n" + errors.read())
