# SPDX-License-Identifier: GPL-2.0-only
"""Counts calls of kernel functions with the kernel's own tracing, without BPF: to hold BPF's counts against.

For each function a kprobe event and a histogram of it (Documentation/trace/kprobetrace.rst, histogram.rst);
only what processes of one name do is counted.
"""

import os
import re
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")
GROUP = "kvirt_test"
# Entries of a histogram; what finds no place in it is told as drops.
SIZE = 16384


def _append(definition):
    # Not as Python appends: that wants to know where the end is.
    fd = os.open(TRACING / "kprobe_events", os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, definition.encode())
    finally:
        os.close(fd)


class Kprobes:
    """While open: how often functions were called, by the value of one argument if it is asked for."""

    def __init__(self, comm, functions):
        """Prepare.

        :param functions: by the name of a function, None or the argument ($arg1, ...) to tell calls apart by
        """
        self._comm = comm
        self._functions = functions
        self.missing = set()

    def __enter__(self):
        try:
            for function, argument in self._functions.items():
                self._open(function, argument)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exception):
        self._close()

    def _event(self, function):
        return TRACING / "events" / GROUP / function

    def _open(self, function, argument):
        definition = f"p:{GROUP}/{function} {function}" + (f" key={argument}:x64" if argument else "")
        try:
            _append(definition)
        except OSError:
            # No such function in this kernel.
            self.missing.add(function)
            return
        trigger = f'hist:keys={"key" if argument else "common_pid"}:size={SIZE} if COMM == "{self._comm}"'
        (self._event(function) / "trigger").write_text(trigger)

    def _close(self):
        for function in self._functions:
            event = self._event(function)
            if event.exists():
                trigger = (event / "trigger").read_text()
                if match := re.search(r"^hist:.*$", trigger, re.M):
                    (event / "trigger").write_text("!" + match[0].replace(" [active]", ""))
                _append(f"-:{GROUP}/{function}")

    def read(self):
        """Return by function the calls until now, by key; a PID where no argument was asked for."""
        result = {}
        for function in self._functions:
            if function in self.missing:
                continue
            text = (self._event(function) / "hist").read_text()
            assert re.search(r"Dropped: 0$", text, re.M), text
            found = re.findall(r"^\{ \w+: +(\w+) \} hitcount: +(\d+)", text, re.M)
            result[function] = {int(key, 0 if key.startswith("0x") else 10): int(n) for key, n in found}
        return result

    def missed(self):
        """Return how many calls the kernel could not count, of all processes."""
        profile = (TRACING / "kprobe_profile").read_text()
        return sum(
            int(line.split()[2]) for line in profile.splitlines() if line.split()[0] in self._functions
        )
