# SPDX-License-Identifier: GPL-2.0-only
"""The user's terminal, given to a program in the guest."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Sequence
from types import FrameType

from kvirt.lab.channel import GuestProcess
from kvirt.lab.guest import Guest


def interact(guest: Guest, argv: Sequence[str]) -> int:
    """Run a program of the guest on this terminal and return its exit status."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    process = guest.popen(argv, tty=True, stdout=_write)

    def resize(number: int = 0, frame: FrameType | None = None) -> None:
        size = shutil.get_terminal_size()
        process.resize(size.lines, size.columns)

    previous = signal.signal(signal.SIGWINCH, resize)
    try:
        # Control characters are for the guest's terminal, Ctrl-C among them.
        tty.setraw(terminal)
        _ = process.pid
        resize()
        threading.Thread(target=_forward, args=(process, terminal), daemon=True).start()
        return process.wait()
    finally:
        signal.signal(signal.SIGWINCH, previous)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]


def _forward(process: GuestProcess, terminal: int) -> None:
    while data := os.read(terminal, 1 << 12):
        process.write(data)
