# SPDX-License-Identifier: GPL-2.0-only
"""What commands that read a kernel through drgn share: the target, progress."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import click

from kvirt.cli import TargetOptions
from kvirt.cli.basics import F, busy
from kvirt.errors import printable
from kvirt.limits import MAX_FINDINGS, PID_MAX_LIMIT

if TYPE_CHECKING:
    from pathlib import Path

    from kvirt.checks.machine import Progress
    from kvirt.findings import Report
    from kvirt.klog import KernelLog
    from kvirt.layout import Layout
    from kvirt.pause import Pause
    from kvirt.target import Target

PID = click.IntRange(min=1, max=PID_MAX_LIMIT)


def strict_option(function: F) -> F:
    """``--strict``."""
    return click.option("--strict", is_flag=True, help="Exit with status 1 on warnings too.")(function)


def max_findings_option(function: F) -> F:
    """``--max-findings N``."""
    return click.option(
        "--max-findings",
        type=click.IntRange(min=0),
        metavar="N",
        default=MAX_FINDINGS,
        show_default=True,
        help="List the worst N findings; all are counted.",
    )(function)


_THE_REST = ("tabulate", "kvirt.checks.machine", "kvirt.render.json", "kvirt.render.table")


# drgn's plugins that give its own command line commands, and import all of its helpers for them.
_NO_PLUGINS = ("builtin_commands", "crash_commands")


# This package of drgn's imports all of its modules, which takes as long as numpy.
_HELPERS = "drgn.helpers.linux"


def _enter_only(package: str) -> None:
    """Have a package's modules imported without what the package itself does."""
    spec = importlib.util.find_spec(package)
    if spec is not None and package not in sys.modules:
        sys.modules[package] = importlib.util.module_from_spec(spec)
        parent, _, name = package.rpartition(".")
        setattr(sys.modules[parent], name, sys.modules[package])


def _import_the_rest() -> None:
    _enter_only(_HELPERS)
    # Whoever imports one of these again meets the same error, and says so.
    with contextlib.suppress(Exception):
        for module in _THE_REST:
            importlib.import_module(module)
        importlib.import_module("kvirt.checks.registry").every_check()


def open_kernel(ctx: click.Context) -> tuple[Target, Layout]:
    """Open the target named before the command, and learn its kernel's layout.

    It takes about as long to read the kernel's types as to import what commands need then, numpy above all.
    So that is done meanwhile, and commands import it when they have the kernel.
    """
    from kvirt.target import open_target

    options = ctx.find_object(TargetOptions) or TargetOptions()
    disabled = os.environ.get("DRGN_DISABLE_PLUGINS")
    os.environ["DRGN_DISABLE_PLUGINS"] = ",".join([*([disabled] if disabled else []), *_NO_PLUGINS])
    # Nothing here multiplies matrices, and the threads that numpy would start for that keep a processor busy
    # for a tenth of a second, as drgn would.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    rest = threading.Thread(target=_import_the_rest)
    with busy("reading the kernel's types"):
        target = open_target(
            options.core,
            options.qemu,
            options.symbols,
            options.types,
            pause=options.pause,
            meanwhile=rest.start,
        )
        if target.pause is not None:
            ctx.call_on_close(partial(_resume, target.pause, options.qemu))
        rest.join()
        from kvirt.layout import layout_of

        return target, layout_of(target.prog)


def _resume(pause: Pause, path: Path | None) -> None:
    if not pause.end():
        click.echo(
            f"kvirt: the guest behind {path} could not be told to go on: give QEMU the command cont.",
            err=True,
        )


def dump_log(target: Target, layout: Layout) -> KernelLog | None:
    """What the log of a dump or a paused guest says of memory; None if the kernel runs, and dmesg has it."""
    if target.moves:
        return None
    from kvirt.klog import read_log

    return read_log(target.prog, layout)


def say_incomplete(report: Report) -> None:
    """Say on stderr what could not be checked: a document's reader may not look for it."""
    for sentence in report.incomplete:
        click.echo(f"kvirt: {printable(sentence)}", err=True)


class _Line:
    """One line on the terminal that is written a few times a second; what is done sooner writes none."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    def show(self, text: Callable[[float], str]) -> None:
        """Write it, unless that was done just now.

        :param text: of the seconds since the beginning
        """
        now = time.monotonic()
        if now - self._last > 0.2:
            self._last = now
            click.echo(f"\r\x1b[K{text(max(now - self._began, 0.001))}", err=True, nl=False)

    def wipe(self) -> None:
        """Leave nothing behind."""
        if self._last != self._began:
            click.echo("\r\x1b[K", err=True, nl=False)


@contextmanager
def page_progress() -> Iterator[Callable[[int], None]]:
    """Count pages on a terminal."""
    if not sys.stderr.isatty():
        yield lambda pages: None
        return
    line, total = _Line(), 0

    def count(pages: int) -> None:
        nonlocal total
        total += pages
        line.show(lambda seconds: f"{total:,} pages, {total / seconds:,.0f}/s")

    try:
        yield count
    finally:
        line.wipe()


BAR = 20


def progress_text(progress: Progress, seconds: float) -> str:
    """A bar, processes and pages, and how long it will take yet if the rest is like what was done."""
    part = progress.done / max(progress.total, 1)
    text = (
        f"[{'#' * int(part * BAR):{BAR}}] {progress.done:,}/{progress.total:,} processes, "
        f"{progress.pages:,} pages, {progress.pages / seconds:,.0f}/s"
    )
    if progress.done:
        left = round(seconds / part - seconds)
        text += f", {left // 60}:{left % 60:02} left"
    return text


@contextmanager
def machine_progress() -> Iterator[Callable[[Progress], None]]:
    """Show on a terminal how far the checking of a machine has come."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    line = _Line()
    try:
        yield lambda progress: line.show(lambda seconds: progress_text(progress, seconds))
    finally:
        line.wipe()
