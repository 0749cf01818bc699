# SPDX-License-Identifier: GPL-2.0-only
"""``kvirt trace``."""

from __future__ import annotations

import math
import os
import re
import select
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

import click

from kvirt.aside import Aside
from kvirt.cli import TargetOptions
from kvirt.cli.basics import busy, format_option
from kvirt.errors import KvirtError, printable
from kvirt.trace import environment, program
from kvirt.trace.command import CannotRun, Command
from kvirt.trace.counts import Counts, Violation, since
from kvirt.trace.filters import Cgroup, Glob, need_first_pid_namespace, process

if TYPE_CHECKING:
    from kvirt.layout_trace import TraceLayout
    from kvirt.trace.session import Session

# What can be asked for, and the member of Request and Counts that it is.
WORDS = {"rmap": "rmap", "copy-vma": "copy_vma", "split-vma": "split_vma"}
# Seconds between two screens or lines, unless told.
INTERVAL = 1.0
INTERVAL_MIN = 0.1
# Seconds after which signals and the end of the command are noticed at the latest.
SLICE = 0.1

_ARGV = "kvirt.trace.argv"


class TraceCommand(click.Command):
    """Takes what stands behind ``--`` for the command to trace: click would only drop the dashes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Split before anything is parsed."""
        if "--" in args:
            at = args.index("--")
            ctx.meta[_ARGV] = tuple(args[at + 1 :])
            args = args[:at]
        return super().parse_args(ctx, args)


@dataclass(frozen=True)
class Plan:
    """What to trace, how long, and how to print it."""

    asked: tuple[str, ...]
    """Of the values of :data:`WORDS`."""
    interval: float | None
    count: int | None
    seconds: float | None
    argv: tuple[str, ...] | None
    json: bool
    top: int
    stacks: bool

    @property
    def screens(self) -> bool:
        """Whether a terminal is drawn again and again; a traced command has it for itself."""
        return not self.json and self.interval is not None and self.argv is None and sys.stdout.isatty()


def _plan(
    words: tuple[str, ...],
    argv: tuple[str, ...] | None,
    seconds: str | None,
    top: int,
    stacks: bool,
    format_: str,
    filters: bool,
    ebpf: bool,
) -> Plan:
    """Make sense of the words.

    :param filters: whether there are filters
    :raises click.UsageError: where they contradict each other
    """
    names = [word for word in words if word in WORDS]
    numbers = list(words[len(names) :])
    for word in numbers:
        if word in WORDS:
            raise click.UsageError(f"{word} stands behind a number: the interval and the count come last.")
        if re.fullmatch(r"\d+\.?\d*|\.\d+", word) is None:
            raise click.UsageError(
                f"'{printable(word)}' cannot be traced: name rmap, copy-vma or split-vma, then the interval "
                "in seconds and how many of them."
            )
    if len(numbers) > 2:
        raise click.UsageError("There are more numbers than an interval and a count: leave the others out.")
    interval = _seconds(numbers[0], "The interval") if numbers else None
    count = None
    if len(numbers) > 1:
        if not numbers[1].isdecimal() or int(numbers[1]) == 0:
            raise click.UsageError(f"The count is a whole number from 1 on, not {numbers[1]}.")
        count = int(numbers[1])
    length = None if seconds is None else _seconds(seconds, "-d")
    if argv is not None:
        if not argv:
            raise click.UsageError("There is no command behind the '--': name one.")
        if filters:
            raise click.UsageError(
                "A command and what it starts are traced alone: leave out -p, --comm and --cgroup, or the "
                "command."
            )
        if length is not None or count is not None:
            raise click.UsageError("A command is traced until it ends: leave out -d and the count.")
    if count is not None and length is not None:
        raise click.UsageError("The count and -d both say when to end: leave one of them out.")
    if stacks and names and "copy-vma" not in names:
        raise click.UsageError("--stacks tells who displaced VMAs, and copy-vma sees that: add it.")
    if ebpf and (argv is not None or numbers or length is not None or format_ != "table"):
        raise click.UsageError(
            "--ebpf prints the program and runs nothing: leave out the interval, the count, -d, --format and "
            "the command."
        )
    if interval is None and length is None and argv is None:
        interval = INTERVAL
    asked = tuple(member for word, member in WORDS.items() if not names or word in names)
    return Plan(asked, interval, count, length, argv, format_ == "json", top, stacks)


def _seconds(text: str, what: str) -> float:
    """
    :param what: what is to last so long
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not INTERVAL_MIN <= number < math.inf:
        raise click.UsageError(
            f"{what} is a number of seconds from {INTERVAL_MIN} on, not {printable(text)}."
        )
    return number


class Signals:
    """SIGINT and SIGTERM: they end the program until something is counted, and then only the counting."""

    def __init__(self) -> None:
        self.ended = False
        self.counting = False
        self._asked = False
        self.command: Command | None = None

    def __enter__(self) -> Signals:
        self._before = {n: signal.signal(n, self._take) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self.counting and not self.ended:
            # Only the first: the next might come while what is attached is detached.
            self.ended = True
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if self.command is None or (number == signal.SIGTERM and self._asked):
            self.ended = True
        elif number == signal.SIGTERM:
            # Ctrl-C went to the command too. It may not want to end: who asks twice does not wait for it.
            self._asked = True
            self.command.signal(number)


class Exit:
    """Knows whether a process has exited; another one that gets its PID is not taken for it."""

    def __init__(self, pid: int) -> None:
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise KvirtError(f"PID {pid} has exited before anything was counted: name another.") from None

    def __enter__(self) -> Exit:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def __call__(self) -> bool:
        """Whether it has."""
        return bool(select.select([self._fd], [], [], 0)[0])


class Printer:
    """Prints what is counted, as it was asked for."""

    # Violations that the screen shows in full; all of them are told at the end.
    SHOWN = 3

    def __init__(self, plan: Plan, about: str) -> None:
        """Prepare.

        :param about: whose events are counted
        """
        # What makes tables takes a while to import: it is done while nobody waits for the programs any more.
        from kvirt.render import trace, trace_json

        self._trace = trace
        self._json = trace_json
        self._plan = plan
        self._about = about
        self._lines = trace.Lines(plan.asked)
        self._told = 0

    def begin(self, counts: Counts) -> None:
        """Say what will not be seen; where the screen is going to be cleared, only at the end."""
        if not self._plan.screens:
            self._absent(counts)

    def violations(self, violations: list[Violation]) -> None:
        """Tell of each at once, unless a screen or a document is going to."""
        if self._plan.json or self._plan.screens:
            return
        self._told += len(violations)
        for one in violations:
            click.echo(self._trace.violation(one))

    def interval(self, total: Counts, last: Counts) -> None:
        """Print an interval."""
        plan = self._plan
        if plan.json:
            self._document(last)
        elif plan.screens:
            height = shutil.get_terminal_size().lines - 1
            click.clear()
            click.echo(self._trace.screen(total, last, self._about, plan.asked, plan.top, self.SHOWN, height))
        else:
            click.echo(self._lines.line(time.strftime("%H:%M:%S"), last))

    def end(self, total: Counts) -> None:
        """Print what it all comes to."""
        plan = self._plan
        if plan.json:
            if plan.interval is None:
                self._document(total)
        else:
            if plan.screens:
                click.clear()
            for one in total.violations[self._told :]:
                click.echo(self._trace.violation(one) + "\n")
            if plan.interval is not None and not plan.screens:
                click.echo()
            click.echo(self._trace.summary(total, self._about, plan.asked, plan.top))
        if plan.screens:
            self._absent(total)
        _say(self._trace.doubts(total))

    def _absent(self, counts: Counts) -> None:
        absent = self._trace.absent(counts)
        _say([f"{name} is not probed: {why}" for name, why in absent.items()])

    def _document(self, counts: Counts) -> None:
        click.echo(self._json.trace_document(counts, top=self._plan.top, stacks=self._plan.stacks))


def _say(sentences: list[str]) -> None:
    for sentence in sentences:
        click.echo(f"kvirt: {printable(sentence)}", err=True)


def _count(
    session: Session, printer: Printer, plan: Plan, signals: Signals, gone: Callable[[], bool] | None
) -> Counts:
    """Count until the plan or somebody says that it is enough; return the totals.

    :param gone: whether the only process that is traced has exited
    """
    began = time.monotonic()
    printed = session.counts()
    printer.begin(printed)
    intervals = 0
    while True:
        now = time.monotonic() - began
        over = plan.seconds is not None and now >= plan.seconds
        if signals.command is not None:
            over = signals.command.status() is not None
        if gone is not None and gone():
            over = True
        due = plan.interval is not None and now >= (intervals + 1) * plan.interval
        if over or signals.ended:
            session.stop()
        if due or over or signals.ended:
            total = session.counts()
            printer.violations(session.poll(0))
            # The rest of an interval too: what was printed adds up to everything.
            if due or (plan.interval is not None and not plan.screens):
                intervals += 1
                printer.interval(total, since(printed, total))
                printed = total
            if over or signals.ended:
                return total
            if intervals == plan.count:
                session.stop()
                return session.counts()
        ends = [now + SLICE]
        if plan.interval is not None:
            ends.append((intervals + 1) * plan.interval)
        if plan.seconds is not None:
            ends.append(plan.seconds)
        printer.violations(session.poll(max(0.0, min(ends) - now)))


def _status(total: Counts) -> int:
    from kvirt.render.trace import absent

    if total.bad:
        return 1
    return 3 if absent(total) or total.lost else 0


EPILOG = """\b
Examples:
  kvirt trace                       all of it, every second, until Ctrl-C
  kvirt trace rmap 5 12             rmap walks, every 5 seconds for a minute
  kvirt trace -p 1234 --stacks      who displaces the VMAs of one process
  kvirt trace --comm 'postgres*'    processes of a name
  kvirt trace --cgroup system.slice -d 60 --format json
  kvirt trace -- make -j8           a command and all that it starts
  kvirt trace --ebpf                the program that the kernel is going to run

\b
Exit status: 0, 1 if an assertion did not hold, 2 wrong usage or environment, 3 if something could not be
counted. With a command: the command's own, or 1 if an assertion did not hold.
"""


@click.command(
    cls=TraceCommand,
    epilog=EPILOG,
    options_metavar="[OPTIONS]",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("words", nargs=-1, metavar="[rmap] [copy-vma] [split-vma] [INTERVAL [COUNT]] [-- COMMAND...]")
@click.option("-p", "--pid", type=click.IntRange(min=1), help="Only VMAs of this process.")
@click.option("--comm", metavar="GLOB", help="Only VMAs of processes with such a name.")
@click.option("--cgroup", metavar="PATH", help="Only VMAs of processes in this cgroup and those below it.")
@click.option("-d", "--duration", metavar="SECONDS", help="End after so many seconds.")
@click.option("--top", type=click.IntRange(min=0), default=10, show_default=True, help="List N processes.")
@click.option("--stacks", is_flag=True, help="Say from where VMAs were displaced.")
@click.option("--ebpf", is_flag=True, help="Print the program, and end.")
@format_option
@click.pass_context
def command(
    ctx: click.Context,
    words: tuple[str, ...],
    pid: int | None,
    comm: str | None,
    cgroup: str | None,
    duration: str | None,
    top: int,
    stacks: bool,
    ebpf: bool,
    format_: str,
) -> None:
    """Count in the running kernel how often the fast path of scalable CoW would hit.

    rmap: for each folio and VMA that a walk came to, whether the folio is mapped at its index. copy-vma and
    split-vma: VMAs that mremap() copies and that are split, in place or displaced. On the way four assertions
    on page offsets are put to the test. Without words all three are traced.
    """
    target = ctx.find_object(TargetOptions) or TargetOptions()
    if target != TargetOptions():
        raise click.UsageError(
            "Only the running kernel can be traced: leave out --core, --qemu, --symbols and --types."
        )
    filters = pid is not None or comm is not None or cgroup is not None
    argv = ctx.meta.get(_ARGV)
    plan = _plan(words, argv, duration, top, stacks, format_, filters, ebpf)
    about = _about(pid, comm, cgroup, argv)
    glob = None if comm is None else Glob.compile(comm)
    group = None if cgroup is None else Cgroup.find(cgroup)
    if pid is not None:
        process(pid)
    elif argv is not None:
        need_first_pid_namespace()
    with Signals() as signals, ExitStack() as stack:
        if argv is not None:
            try:
                signals.command = stack.enter_context(Command(argv))
            except CannotRun as error:
                _say([str(error)])
                ctx.exit(error.status)
        request = program.Request(
            **{member: member in plan.asked for member in WORDS.values()},
            pid=pid,
            comm=glob,
            cgroup=group,
            family=argv is not None,
            stacks=stacks,
        )
        if ebpf:
            click.echo(program.source(request, _layout()), nl=False)
            return
        environment.check()
        with busy("compiling and attaching the programs"):
            with Aside(_layout) as reading:
                # Only now what takes its time.
                bcc = environment.load_bcc()
                from kvirt.trace.session import Session

                layout = reading.result()
            session = stack.enter_context(Session(request, layout, bcc))
            for sentence in environment.switched_off(session.single):
                raise KvirtError(sentence)
        printer = Printer(plan, f"Linux {os.uname().release} ({layout.scheme}), {about}")
        signals.counting = True
        if signals.command is not None:
            session.follow(signals.command.pid)
            try:
                signals.command.start()
            except CannotRun as error:
                _say([str(error)])
                ctx.exit(error.status)
        # While it is attached.
        single = session.single
        gone = None if pid is None else stack.enter_context(Exit(pid))
        total = _count(session, printer, plan, signals, gone)
        doubts = environment.switched_off(single)
        if gone is not None and gone():
            _say([f"PID {pid} has exited: this is all that there was of it."])
        status = None if signals.command is None else signals.command.status()
    printer.end(total)
    _say(doubts)
    if status is None or total.bad:
        status = _status(total) or (3 if doubts else 0)
    ctx.exit(status)


def _layout() -> TraceLayout:
    from kvirt.btf import kernel_btf
    from kvirt.layout_trace import read_trace_layout

    return read_trace_layout(kernel_btf())


def _about(pid: int | None, comm: str | None, cgroup: str | None, argv: tuple[str, ...] | None) -> str:
    """Say whose events are counted."""
    if argv is not None:
        return f"{printable(shlex.join(argv))} and what it starts"
    parts = []
    if pid is not None:
        parts.append(f"process {pid}")
    if comm is not None:
        parts.append(f"processes named {printable(comm)}")
    if cgroup is not None:
        parts.append(f"cgroup {printable(cgroup)}")
    return ", ".join(parts) or "all processes"
