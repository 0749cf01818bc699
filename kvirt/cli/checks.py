# SPDX-License-Identifier: GPL-2.0-only
"""``kvirt checks``."""

from __future__ import annotations

import difflib

import click

from kvirt.checks.registry import Check, every_check
from kvirt.cli import TargetOptions
from kvirt.cli.basics import format_option
from kvirt.cli.common import open_kernel
from kvirt.errors import KvirtError
from kvirt.render.checks import checks_document, checks_table, explanation


def _find(id_: str) -> Check:
    known = {check.id: check for check in every_check()}
    check = known.get(id_.upper())
    if check is None:
        near = difflib.get_close_matches(id_.upper(), known, n=1)
        then = f"did you mean {near[0]}?" if near else "'kvirt checks' lists them."
        raise KvirtError(f"There is no invariant {id_}: {then}")
    return check


@click.command("checks")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@format_option
@click.pass_context
def command(ctx: click.Context, ids: tuple[str, ...], format_: str) -> None:
    """List the invariants, or explain some.

    Of each: what must hold, how bad it is if it does not, which kernels it is about, and which kernel
    code relies on it. No kernel is read, unless one is named by --core or --qemu: then those invariants
    are marked that mean nothing on it.
    """
    checks = [_find(id_) for id_ in ids] or every_check()
    options = ctx.find_object(TargetOptions) or TargetOptions()
    named = options.core is not None or options.qemu is not None
    layout = open_kernel(ctx)[1] if named else None
    if format_ == "json":
        click.echo(checks_document(checks, layout))
    elif ids:
        click.echo("\n\n".join(explanation(check, layout) for check in checks))
    else:
        click.echo(checks_table(checks, layout))
