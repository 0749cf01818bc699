# SPDX-License-Identifier: GPL-2.0-only
"""``kvirt check-all``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from kvirt.cli.basics import format_option
from kvirt.cli.common import (
    dump_log,
    machine_progress,
    max_findings_option,
    open_kernel,
    say_incomplete,
    strict_option,
)

if TYPE_CHECKING:
    from kvirt.findings import Report, TaskReport


def _until_interrupted(tasks: Iterator[TaskReport], report: Report) -> Iterator[TaskReport]:
    """Ctrl-C ends with what was found until then."""
    try:
        yield from tasks
    except KeyboardInterrupt:
        report.note_incomplete(
            "Interrupted before every process was checked: let it run to its end for the whole verdict."
        )


@click.command("check-all")
@strict_option
@max_findings_option
@format_option
@click.pass_context
def command(ctx: click.Context, strict: bool, max_findings: int, format_: str) -> None:
    """Check the page offsets of every process.

    Each address space is checked once, as check-pid does it, and what binds them together: the trees
    and counts of anon_vmas. Says what share of all anonymous pages was verified. Ctrl-C stops, and
    prints what was found until then.

    Exit status: 0 consistent, 1 an error was found, 2 wrong usage or environment, 3 no error found but
    something could not be checked. Processes that exit meanwhile are counted, and do not matter to it.
    """
    target, layout = open_kernel(ctx)

    from kvirt.checks.machine import MachineChecker
    from kvirt.findings import Report
    from kvirt.render.json import check_document
    from kvirt.render.table import machine_table

    report, log = Report(max_findings), dump_log(target, layout)
    checker = MachineChecker(target.prog, layout, moves=target.moves)
    with machine_progress() as progress:
        tasks = _until_interrupted(checker.tasks(report, progress, rows=format_ == "json"), report)
        if format_ == "json":
            for piece in check_document(target, layout, report, tasks, log):
                click.echo(piece, nl=False)
        else:
            for _ in tasks:
                # Only the sums are wanted.
                pass
    if format_ == "json":
        say_incomplete(report)
    else:
        click.echo(machine_table(target, layout, report, log))
    ctx.exit(report.exit_status(strict))
