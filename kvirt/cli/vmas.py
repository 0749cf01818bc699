# SPDX-License-Identifier: GPL-2.0-only
"""``kvirt vmas``."""

from __future__ import annotations

import click

from kvirt.cli.basics import format_option
from kvirt.cli.common import PID, open_kernel


@click.command("vmas")
@click.argument("pid", metavar="PID", type=PID)
@format_option
@click.pass_context
def command(ctx: click.Context, pid: int, format_: str) -> None:
    """Show a process's VMAs with both page offsets.

    "displaced" is by how many pages the offset of anonymous folios differs from the address: 0 is in
    place. A displaced VMA is not broken: a moved one is, and the stack of every process.
    """
    target, layout = open_kernel(ctx)

    from kvirt.checks.process import ProcessChecker
    from kvirt.checks.task import list_vmas
    from kvirt.render.json import vmas_document
    from kvirt.render.table import vmas_table
    from kvirt.tasks import find_process

    process = find_process(target.prog, pid)
    space, rows = list_vmas(ProcessChecker(target.prog, layout, moves=target.moves), process)
    render = vmas_document if format_ == "json" else vmas_table
    click.echo(render(target, layout, pid, process.comm, rows))
    if space.broken_tree is not None:
        click.echo(f"kvirt: the list is not complete: {space.broken_tree}.", err=True)
        ctx.exit(3)
