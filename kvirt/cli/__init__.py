# SPDX-License-Identifier: GPL-2.0-only
"""The program ``kvirt``: options of the target, and the commands, each loaded when it is called."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kvirt import __version__
from kvirt.errors import KvirtError, printable

# Importing drgn and numpy costs more than all the rest: a command's module is imported by its name
# here only when the command runs, and --help needs none of them.
COMMANDS = {
    "check-all": (
        "kvirt.cli.check_all",
        "Check every process: what share of anonymous pages is right.",
    ),
    "check-pid": (
        "kvirt.cli.check_pid",
        "Check the page offsets of processes: VMAs, pages, verdict.",
    ),
    "checks": (
        "kvirt.cli.checks",
        "List the invariants, or explain one.",
    ),
    "lab": ("kvirt.cli.lab", "Kernels, guests and dumps to try kvirt on."),
    "trace": (
        "kvirt.cli.trace",
        "Count fast-path hits and fallbacks in the running kernel (BPF).",
    ),
    "vmas": ("kvirt.cli.vmas", "Show a process's VMAs with both page offsets."),
}


@dataclass(frozen=True)
class TargetOptions:
    """Where the kernel comes from, as given before the command."""

    core: Path | None = None
    qemu: Path | None = None
    symbols: tuple[Path, ...] = ()
    types: str = "auto"
    pause: bool = False


class LazyGroup(click.Group):
    """A group some of whose commands are imported when they are called."""

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str]] | None = None, **kwargs: Any) -> None:
        """Prepare.

        :param lazy: by name, the module that has the command as ``command``, and its line in --help
        """
        super().__init__(*args, **kwargs)
        self.lazy = lazy or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands without importing them."""
        return sorted([*super().list_commands(ctx), *self.lazy])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module, unless it is here already."""
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        command = importlib.import_module(self.lazy[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands, those not imported by the line given for them."""
        rows = []
        for name in self.list_commands(ctx):
            here = super().get_command(ctx, name)
            rows.append((name, self.lazy[name][1] if here is None else here.get_short_help_str(70)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-c", "--core", type=click.Path(path_type=Path), help="Read this vmcore.")
@click.option(
    "--qemu",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="Read a running QEMU guest through its QMP socket.",
)
@click.option(
    "--pause",
    is_flag=True,
    help="Stop the QEMU guest while it is read; it goes on afterwards, whatever happens.",
)
@click.option(
    "-s",
    "--symbols",
    type=click.Path(path_type=Path),
    multiple=True,
    help="vmlinux or debug file with the kernel's types; repeatable.",
)
@click.option(
    "--types",
    type=click.Choice(["auto", "dwarf", "btf"]),
    default="auto",
    show_default=True,
    help="Where types come from: debug information, the kernel's own BTF, or what is at hand.",
)
@click.version_option(__version__)
@click.pass_context
def cli(
    ctx: click.Context,
    core: Path | None,
    qemu: Path | None,
    pause: bool,
    symbols: tuple[Path, ...],
    types: str,
) -> None:
    """Show whether a kernel keeps its anonymous page offsets right.

    Without --core or --qemu the running kernel is read. kvirt never writes to the kernel it reads.

    Exit status: 0 consistent, 1 an error was found, 2 wrong usage or environment, 3 no error found but
    something could not be checked.
    """
    if core is not None and qemu is not None:
        raise click.UsageError("--core and --qemu exclude each other: name one kernel.")
    if pause and qemu is None:
        raise click.UsageError("--pause stops a QEMU guest: name its QMP socket with --qemu.")
    ctx.obj = TargetOptions(core, qemu, symbols, types, pause)


def main() -> None:
    """Run the program; every failure is a sentence on stderr and exit status 2.

    :raises KeyboardInterrupt: on Ctrl-C, for which click itself would end with 1, and that says that an error
        was found in the kernel
    """
    try:
        sys.exit(cli(prog_name="kvirt", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        raise KeyboardInterrupt from None
    except KvirtError as error:
        print(f"kvirt: {printable(str(error), keep=chr(10))}", file=sys.stderr)
        sys.exit(error.status)
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more while flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        # Whatever a damaged kernel makes of it: 1 would say that an error was found in the kernel.
        if "KVIRT_DEBUG" in os.environ:
            raise
        print(
            f"kvirt: an unforeseen {type(error).__name__} ({printable(str(error))}) ended this run: it is a "
            "defect of kvirt; run it again with KVIRT_DEBUG=1 and report what it prints.",
            file=sys.stderr,
        )
        sys.exit(2)
