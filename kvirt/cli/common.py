# SPDX-License-Identifier: GPL-2.0-only
"""What commands share: the target, the format, progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from kvirt.cli import TargetOptions
from kvirt.layout import Layout, layout_of
from kvirt.target import Target, open_target

# PID_MAX_LIMIT, include/linux/threads.h
PID = click.IntRange(min=1, max=1 << 22)

F = TypeVar("F", bound=Callable[..., Any])


def format_option(function: F) -> F:
    """``--format table|json``."""
    return click.option(
        "--format",
        "format_",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="How to print the result.",
    )(function)


def open_kernel(ctx: click.Context) -> tuple[Target, Layout]:
    """Open the target named before the command, and learn its kernel's layout."""
    options = ctx.find_object(TargetOptions) or TargetOptions()
    with busy("reading the kernel's types"):
        target = open_target(options.core, options.qemu, options.symbols, options.types)
        return target, layout_of(target.prog)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Say on a terminal what is being waited for, and take it back when it is done."""
    terminal = sys.stderr.isatty()
    if terminal:
        click.echo(f"{what} ...", err=True, nl=False)
    try:
        yield
    finally:
        if terminal:
            click.echo("\r\x1b[K", err=True, nl=False)


@contextmanager
def page_progress() -> Iterator[Callable[[int], None]]:
    """Count pages on a terminal, a few times a second."""
    if not sys.stderr.isatty():
        yield lambda pages: None
        return
    total, last, began = 0, 0.0, time.monotonic()

    def count(pages: int) -> None:
        nonlocal total, last
        total += pages
        now = time.monotonic()
        if now - last > 0.2:
            last = now
            rate = total / max(now - began, 0.001)
            click.echo(f"\r\x1b[K{total:,} pages, {rate:,.0f}/s", err=True, nl=False)

    try:
        yield count
    finally:
        click.echo("\r\x1b[K", err=True, nl=False)
