# SPDX-License-Identifier: GPL-2.0-only
"""``kvirt lab``: kernels, guests and dumps to try kvirt on."""

from __future__ import annotations

import signal
import sys
import tempfile
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from kvirt.cli import LazyGroup
from kvirt.errors import KvirtError
from kvirt.lab import defaults

if TYPE_CHECKING:
    from kvirt.lab.channel import GuestProcess
    from kvirt.lab.guest import Guest
    from kvirt.lab.kernels import Kernel

WORKLOAD = ("kvirt", "lab", "workload", "--with", "hugetlb,ksm,swap")
PASS_THROUGH = {"ignore_unknown_options": True, "help_option_names": []}


LAZY = {"damage": ("kvirt.cli.damage", "Check a process of a vmcore as if an invariant were broken.")}


@click.group(cls=LazyGroup, lazy=LAZY)
def command() -> None:
    """Kernels, guests and dumps to try kvirt on.

    Everything fetched or built is kept in ~/.cache/kvirt, or in $KVIRT_CACHE.
    """
    # As Ctrl-C does, so that what was started is ended and what was made is removed.
    signal.signal(signal.SIGTERM, _terminate)


suite_option = click.option(
    "--suite", default=defaults.SUITE, show_default=True, help="The Debian that guests' user space is from."
)


def guest_options(function: Any) -> Any:
    """Add the options that say which guest to boot."""
    from_here = [
        click.option(
            "--kernel",
            "kernel_name",
            default=defaults.KERNEL,
            show_default=True,
            metavar="VERSION|BZIMAGE",
            help="A version of Debian's kernel (the newest that matches), or a bzImage.",
        ),
        click.option(
            "--vmlinux",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="The vmlinux of the same build as the bzImage.",
        ),
        click.option("--memory", default=defaults.MEMORY, show_default=True, help="The guest's memory."),
        click.option("--cpus", default=defaults.CPUS, show_default=True, type=click.IntRange(1, 64)),
        click.option(
            "--timeout",
            default=defaults.TIMEOUT,
            show_default=True,
            help="Seconds after which the guest is ended.",
        ),
        click.option("--append", default="", help="Words for the kernel's command line."),
        suite_option,
    ]
    for option in reversed(from_here):
        function = option(function)
    return function


@command.command()
@click.argument("pattern", default=defaults.KERNEL)
@click.option("--update", is_flag=True, help="Ask the mirror for a newer one.")
def kernel(pattern: str, update: bool) -> None:
    """Fetch the newest Debian kernel of a version, and say where it is."""
    from kvirt.lab.kernels import get_kernel
    from kvirt.lab.progress import TerminalReport

    found = get_kernel(pattern, TerminalReport(), update=update)
    click.echo(f"release  {found.release}")
    click.echo(f"image    {found.image}")
    click.echo(f"vmlinux  {found.vmlinux}")
    click.echo(f"modules  {found.modules}")


@command.command()
@suite_option
def root(suite: str) -> None:
    """Build the guests' root directory, and say where it is."""
    from kvirt.lab.progress import TerminalReport
    from kvirt.lab.root import get_root

    click.echo(get_root(TerminalReport(), suite=suite))


@command.command()
@click.argument("patterns", nargs=-1)
def prepare(patterns: tuple[str, ...]) -> None:
    """Fetch kernels and build the root, at the same time."""
    from kvirt.lab import host
    from kvirt.lab.kernels import get_kernel
    from kvirt.lab.progress import TerminalReport
    from kvirt.lab.root import get_root

    report = TerminalReport()
    errors: list[BaseException] = []

    def build_root() -> None:
        try:
            get_root(report)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=build_root)
    thread.start()
    try:
        for pattern in patterns or (defaults.KERNEL,):
            click.echo(get_kernel(pattern, report).release)
        thread.join()
    except BaseException:
        # Nobody waits for the root then: its builder fails, and clears away what it has made.
        host.end_all()
        thread.join()
        raise
    if errors:
        raise errors[0]


@command.command(context_settings={"ignore_unknown_options": True})
@guest_options
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def run(argv: tuple[str, ...], **options: Any) -> None:
    """Run a command in a fresh guest: its output, its input, its exit status.

    \b
    Example:
      kvirt lab run -- kvirt check-pid 1
    """
    with _guest(**options) as guest:
        out, err = sys.stdout.buffer, sys.stderr.buffer
        process = guest.popen(argv, stdout=_sink(out), stderr=_sink(err))
        if sys.stdin is None or sys.stdin.isatty():
            process.close_stdin()
        else:
            threading.Thread(target=_forward, args=(process,), daemon=True).start()
        status = process.wait()
    sys.exit(status)


@command.command(context_settings={"ignore_unknown_options": True})
@guest_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "--format",
    "dump_format",
    default="elf",
    show_default=True,
    type=click.Choice(defaults.DUMP_FORMATS),
    help="The kdump ones are flattened.",
)
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
def dump(argv: tuple[str, ...], output: Path, dump_format: str, **options: Any) -> None:
    """Take a vmcore of a fresh guest.

    COMMAND is started first, and its first line of output waited for. Printed are the paths of the
    vmcore and of the vmlinux to read it with.
    """
    with _guest(**options) as guest:
        if argv:
            _start(guest, argv)
        guest.dump(output, dump_format)
        click.echo(f"core     {output}")
        click.echo(f"vmlinux  {guest.kernel.vmlinux}")


@command.command(context_settings={"ignore_unknown_options": True})
@guest_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR|FILE")
@click.option(
    "-d",
    "--dump-level",
    "levels",
    multiple=True,
    default=defaults.DUMP_LEVELS,
    show_default=True,
    type=click.IntRange(0, 31),
    help="What makedumpfile leaves out; repeatable.",
)
@click.option("--elf", is_flag=True, help="Save /proc/vmcore as it is, too.")
@click.option(
    "--compression",
    default="lzo",
    show_default=True,
    type=click.Choice(list(defaults.COMPRESSIONS)),
)
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
def crash(
    argv: tuple[str, ...],
    output: Path,
    levels: tuple[int, ...],
    elf: bool,
    compression: str,
    **options: Any,
) -> None:
    """Crash a fresh guest, and have a capture kernel save its memory (kdump).

    COMMAND, the workload if none is named, is started first, and its first line of output waited for.
    A single dump goes to a FILE, others into a DIR. Printed are the paths of the vmcores and of the
    vmlinux to read them with.
    """
    from kvirt.lab import capture

    saves = {f"vmcore-d{level}": capture.what(level, compression) for level in dict.fromkeys(levels)}
    if elf:
        saves["vmcore-elf"] = capture.ELF
    into_file = len(saves) == 1 and not output.is_dir()
    directory = output.parent if into_file else output
    try:
        directory.mkdir(exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".kvirt-crash-", dir=directory)
    except OSError as error:
        raise KvirtError(
            f"Nothing can be written to {directory} ({error.strerror}): name a directory of your own."
        ) from error
    with scratch, _guest(**options, output=Path(scratch.name).absolute()) as guest:
        _start(guest, argv or WORKLOAD)
        saved = capture.crash(guest, list(saves.values()), guest.report)
        for name, path in zip(saves, saved, strict=True):
            target = output if into_file else directory / name
            path.replace(target)
            click.echo(f"core     {target}")
        click.echo(f"vmlinux  {guest.kernel.vmlinux}")


@command.command()
@guest_options
def shell(**options: Any) -> None:
    """Work in a fresh guest, in a shell on this terminal. Leaving the shell ends the guest."""
    from kvirt.lab.terminal import interact

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise KvirtError("The shell needs a terminal: use `kvirt lab run -- COMMAND` without one.")
    with _guest(**options) as guest:
        click.echo("kvirt is on PATH, its tree in /kvirt. Ctrl-D leaves.", err=True)
        status = interact(guest, ["bash", "-l"])
    sys.exit(status)


@command.command(context_settings=PASS_THROUGH, add_help_option=False)
@click.argument("argv", nargs=-1, type=click.UNPROCESSED)
def workload(argv: tuple[str, ...]) -> None:
    """Put this machine's memory into the states that kvirt checks, and hold them."""
    from kvirt.lab.workload import main

    sys.exit(main(list(argv)))


def _kernel(name: str, vmlinux: Path | None) -> Kernel:
    from kvirt.lab.kernels import Kernel, get_kernel
    from kvirt.lab.progress import TerminalReport

    if "/" in name or Path(name).is_file():
        return Kernel.from_files(Path(name), vmlinux)
    if vmlinux is not None:
        raise KvirtError("--vmlinux goes with a bzImage of your own: name that with --kernel.")
    return get_kernel(name, TerminalReport())


def _guest(
    kernel_name: str,
    vmlinux: Path | None,
    memory: str,
    cpus: int,
    timeout: float,
    append: str,
    suite: str,
    output: Path | None = None,
) -> Guest:
    from kvirt.lab.guest import Guest
    from kvirt.lab.progress import TerminalReport

    return Guest(
        _kernel(kernel_name, vmlinux),
        memory=memory,
        cpus=cpus,
        timeout=timeout,
        append=append,
        suite=suite,
        output=output,
        report=TerminalReport(),
    )


def _start(guest: Guest, argv: Sequence[str]) -> None:
    """Start a command in a guest, and wait for its first line."""
    process = guest.popen(argv)
    line = process.readline()
    click.echo(textwrap.shorten(line, 200, placeholder=" ..."), err=True)
    if not line:
        raise KvirtError(
            f"{argv[0]} ended in the guest (exit status {process.wait()}) before it had "
            f"printed a line: {process.stderr_text().strip() or 'it gave no reason'}"
        )


def _sink(stream: Any) -> Any:
    def write(data: bytes) -> None:
        stream.write(data)
        stream.flush()

    return write


def _forward(process: GuestProcess) -> None:
    import os

    # Not sys.stdin.buffer.read(), which would wait for a full buffer.
    while data := os.read(sys.stdin.fileno(), 1 << 16):
        process.write(data)
    process.close_stdin()


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
