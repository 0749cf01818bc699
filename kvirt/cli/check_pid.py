# SPDX-License-Identifier: GPL-2.0-only
"""``kvirt check-pid``."""

from __future__ import annotations

import click

from kvirt.cli.basics import format_option
from kvirt.cli.common import (
    PID,
    dump_log,
    max_findings_option,
    open_kernel,
    page_progress,
    say_incomplete,
    strict_option,
)
from kvirt.filtered import why_filtered


@click.command("check-pid")
@click.argument("pids", metavar="PID...", type=PID, nargs=-1, required=True)
@click.option("--vmas/--no-vmas", default=True, show_default=True, help="Print the table of VMAs too.")
@strict_option
@max_findings_option
@format_option
@click.pass_context
def command(
    ctx: click.Context, pids: tuple[int, ...], vmas: bool, strict: bool, max_findings: int, format_: str
) -> None:
    """Check the page offsets of processes.

    Every VMA's offsets, anon_vma and chain, and the folio of every page in the page tables, are checked
    against what the kernel's reverse mapping relies on.

    Exit status: 0 consistent, 1 an error was found, 2 wrong usage or environment, 3 no error found but
    something could not be checked.
    """
    target, layout = open_kernel(ctx)

    from kvirt.checks.process import ProcessChecker
    from kvirt.checks.task import check_task
    from kvirt.findings import Report
    from kvirt.render.json import check_document
    from kvirt.render.table import check_table
    from kvirt.tasks import find_process

    checker = ProcessChecker(target.prog, layout, moves=target.moves)
    processes = [find_process(target.prog, pid) for pid in pids]
    report = Report(max_findings)
    with page_progress() as progress:
        tasks = [check_task(checker, process, progress) for process in processes]
    doubtful = [task for task in tasks if task.incomplete]
    why = why_filtered(target.prog, [sentence for task in doubtful for sentence in task.incomplete])
    if why is not None:
        doubtful[0].incomplete.insert(0, why)
    for task in tasks:
        report.add(task)
    log = dump_log(target, layout)
    if log is not None:
        log = log.about(pids)
    if format_ == "json":
        for piece in check_document(target, layout, report, tasks, log):
            click.echo(piece, nl=False)
        say_incomplete(report)
    else:
        click.echo(check_table(target, layout, report, tasks, log, vmas=vmas))
    ctx.exit(report.exit_status(strict))
