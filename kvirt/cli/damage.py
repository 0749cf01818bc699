# SPDX-License-Identifier: GPL-2.0-only
"""``kvirt lab damage``."""

from __future__ import annotations

import click

from kvirt.checks.process import ProcessChecker
from kvirt.checks.registry import all_checks
from kvirt.checks.task import check_task
from kvirt.cli.basics import format_option
from kvirt.cli.common import PID, open_kernel
from kvirt.errors import KvirtError
from kvirt.findings import Report
from kvirt.lab.damage import DAMAGES, Scene
from kvirt.render.json import check_document
from kvirt.render.table import check_table
from kvirt.target import Kind
from kvirt.tasks import find_process


class HexAddress(click.ParamType[int]):
    """An address, with or without 0x."""

    name = "address"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it as hexadecimal."""
        if isinstance(value, int):
            return value
        try:
            return int(str(value), 16)
        except ValueError:
            self.fail(f"{value!r} is not a hexadecimal address.", param, ctx)


def _list(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        click.echo("\n".join(DAMAGES))
        ctx.exit()


@click.command("damage")
@click.argument("damage", metavar="DAMAGE")
@click.argument("pid", metavar="PID", type=PID)
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="Name all.")
@click.option("--at", type=HexAddress(), help="Damage the VMA or page at this address, not the first fit.")
@format_option
@click.pass_context
def command(ctx: click.Context, damage: str, pid: int, at: int | None, format_: str) -> None:
    """Check a process of a vmcore as if one of its invariants were broken.

    \b
    kvirt -c vmcore lab damage FOLIO-INDEX 1

    The dump is not changed: a difference is laid over what is read from it.
    """
    if damage not in DAMAGES:
        raise KvirtError(f"{damage} is not a damage that kvirt can make up: see 'kvirt lab damage --list'.")
    target, layout = open_kernel(ctx)
    if target.kind is not Kind.CORE:
        raise KvirtError("Damage is made up over a dump only: name a vmcore with --core.")
    if damage.partition("/")[0] not in {check.id for check in all_checks(layout)}:
        raise KvirtError(f"{damage} means nothing on this kernel: its scheme is {layout.scheme}.")
    process = find_process(target.prog, pid)
    made = DAMAGES[damage](Scene(target.prog, process.mm, at))
    click.echo(f"made up: {made.description}; the dump is not changed", err=True)
    task = check_task(ProcessChecker(target.prog, layout, moves=False), process)
    report = Report()
    report.add(task)
    if format_ == "json":
        for piece in check_document(target, layout, report, [task]):
            click.echo(piece, nl=False)
    else:
        click.echo(check_table(target, layout, report, [task], vmas=False))
    ctx.exit(report.exit_status())
