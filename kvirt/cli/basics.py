# SPDX-License-Identifier: GPL-2.0-only
"""What commands share that needs neither drgn nor numpy, which take long to import."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

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
