# SPDX-License-Identifier: GPL-2.0-only
"""What the lab says while it works: one line a step, and a live line on a terminal."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

Report = Callable[[str], None]
"""Anything that takes a sentence. A :class:`TerminalReport` shows live lines too."""

# A step that took less is not worth a second line.
WORTH_SAYING = 5.0


def silent(text: str) -> None:
    """Report nothing."""


class TerminalReport:
    """Reports on stderr; on a terminal with a last line that shows the steps under way.

    Several steps may be under way at once, in threads of their own: they share the line.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: dict[tuple[int, str], tuple[str, float]] = {}
        self._tty = sys.stderr.isatty()
        self._ended = threading.Event()

    def __call__(self, text: str) -> None:
        """Print one line."""
        with self._lock:
            self._clear()
            click.echo(text, err=True)
            self._draw()

    def show(self, key: tuple[int, str], text: str, started: float) -> None:
        """Show ``text`` and the time since ``started`` on the live line."""
        with self._lock:
            first = not self._steps
            self._steps[key] = (text, started)
            self._draw()
        if first and self._tty:
            self._ended = threading.Event()
            threading.Thread(target=self._tick, args=(self._ended,), daemon=True).start()

    def hide(self, key: tuple[int, str]) -> None:
        """Take a step off the live line."""
        with self._lock:
            self._steps.pop(key, None)
            self._clear()
            self._draw()
            if not self._steps:
                self._ended.set()

    def _tick(self, ended: threading.Event) -> None:
        while not ended.wait(1):
            with self._lock:
                self._draw()

    def _clear(self) -> None:
        if self._tty:
            click.echo("\r\x1b[K", nl=False, err=True)

    def _draw(self) -> None:
        if self._tty and self._steps:
            now = time.monotonic()
            parts = [f"{text} ({now - since:.0f} s)" for text, since in self._steps.values()]
            width = max(shutil.get_terminal_size().columns - 1, 20)
            click.echo("\r" + "; ".join(parts)[:width] + "\x1b[K", nl=False, err=True)


@contextmanager
def step(report: Report, title: str, label: str) -> Iterator[Callable[[str], None]]:
    """Announce a step that takes a while; the block is given a function that shows a detail of it.

    :param label: What the live line calls it, where the steps under way share the width.
    """
    started = time.monotonic()
    key = (threading.get_ident(), title)
    report(f"{title} ...")
    screen = report if isinstance(report, TerminalReport) else None

    def detail(text: str) -> None:
        if screen is not None:
            screen.show(key, f"{label}: {text}", started)

    if screen is not None:
        screen.show(key, label, started)
    try:
        yield detail
    finally:
        if screen is not None:
            screen.hide(key)
    took = time.monotonic() - started
    if took > WORTH_SAYING:
        report(f"{title}: done in {took:.0f} s")
