# SPDX-License-Identifier: GPL-2.0-only
"""The storm's processes: each draws operations, forks others that do the same, and execs at times."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from kvirt.lab.procfs import PAGE_SIZE
from kvirt.lab.storm.arena import Arena, NoArea, make_paper
from kvirt.lab.storm.operations import OPERATIONS
from kvirt.lab.workload import syscalls as sc
from kvirt.lab.workload.process import die_with_parent

# What processes do to each other, beside the operations on memory.
FORK, SPAWN, EXEC, EXIT, FAULT = "fork", "spawn", "exec", "exit", "fault in a thread"
FORK_WIDE = "fork of many VMAs"
NAMES = (*(operation.name for operation in OPERATIONS), FORK, SPAWN, EXEC, EXIT, FAULT, FORK_WIDE)
NUMBER = {name: number for number, name in enumerate(NAMES)}

FORK_WEIGHT, SPAWN_WEIGHT = 12, 3
# Generations, and children of one process at a time.
DEPTH, CHILDREN = 4, 2
# Operations that a child lives for, and seconds after which it is stuck and killed.
LIFE = (1, 24)
STUCK = 60
# VMAs of the process that is nearly always in the middle of a fork, with mmap_lock held for write.
WIDE = 100
# Programs that do nothing for a while: small processes to look at. Most of an exec is before that.
PROGRAMS = (("/bin/true",), ("/bin/sleep", "0.02"), ("/bin/sh", "-c", "x=1; (x=2; exec /bin/true); :"))


class Account:
    """A pipe into which every operation is written as two bytes; whoever reads it keeps the count.

    Such a write is whole, whoever dies: number of the operation, and errno if it was refused.
    """

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.refused: dict[str, Counter[int]] = {name: Counter() for name in NAMES}
        """By errno."""
        self.reader, self._writer = os.pipe()
        os.set_blocking(self.reader, False)

    def note(self, name: str, error: OSError | None = None) -> None:
        """Write down one operation."""
        os.write(self._writer, bytes((NUMBER[name], 0 if error is None else error.errno or 255)))

    def read(self) -> None:
        """Count what was written down."""
        try:
            while data := os.read(self.reader, 1 << 16):
                for number, error in zip(data[::2], data[1::2], strict=True):
                    if error:
                        self.refused[NAMES[number]][error] += 1
                    else:
                        self.done[NAMES[number]] += 1
        except BlockingIOError:
            pass

    def missing(self) -> dict[str, str]:
        """Operations that were never done, and why: the errors that the kernel gave."""
        return {
            name: ", ".join(
                f"{errno.errorcode.get(number, str(number))} {count} times"
                for number, count in self.refused[name].most_common()
            )
            or "never tried"
            for name in NAMES
            if not self.done[name]
        }


class Budget:
    """How many more processes there may be: a pipe with a byte for each."""

    def __init__(self, count: int) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.write(self._writer, bytes(count))

    def take(self) -> bool:
        """Whether there may be one more."""
        try:
            return bool(os.read(self._reader, 1))
        except BlockingIOError:
            return False

    def give_back(self) -> None:
        """Whoever reaps a process says so."""
        os.write(self._writer, b"\0")


class Actor:
    """One process of the storm."""

    def __init__(self, random: Random, account: Account, budget: Budget) -> None:
        self.random = random
        self.account = account
        self.budget = budget
        self.arena = Arena(random, make_paper())
        self.depth = 0
        self.children: set[int] = set()
        self._names = [*(operation.name for operation in OPERATIONS), FORK, SPAWN]
        self._weights = [*(operation.weight for operation in OPERATIONS), FORK_WEIGHT, SPAWN_WEIGHT]
        self._runs = {operation.name: operation.run for operation in OPERATIONS}
        self._runs |= {FORK: self._fork, SPAWN: self._spawn}

    def go_on(self, operations: int | None = None) -> None:
        """Do operations, without a number for ever."""
        while operations is None or operations > 0:
            (name,) = self.random.choices(self._names, self._weights)
            self._do(name)
            self._reap()
            if operations is not None:
                operations -= 1

    def _do(self, name: str) -> None:
        try:
            self._runs[name](self.arena)
        except NoArea:
            return
        except OSError as error:
            self.account.note(name, error)
            return
        # A fork or spawn that the budget does not allow has raised NoArea.
        self.account.note(name)

    def _reap(self) -> None:
        for pid in list(self.children):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self.children.remove(pid)
                self.budget.give_back()

    def _take_budget(self) -> None:
        if len(self.children) >= CHILDREN or self.depth >= DEPTH or not self.budget.take():
            raise NoArea

    def _fork(self, arena: Arena) -> None:
        self._take_budget()
        seed = self.random.random()
        pid = os.fork()
        if pid:
            self.children.add(pid)
            return
        try:
            self._live(Random(seed))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)

    def _live(self, random: Random) -> None:
        signal.alarm(STUCK)
        self.random = self.arena.random = random
        self.children = set()
        self.depth += 1
        self.go_on(random.randint(*LIFE))
        if random.random() < 0.4:
            signal.alarm(0)
            self.account.note(EXEC)
            program = random.choice(PROGRAMS)
            os.execv(program[0], program)
        # Its children may live on, and have the anon_vmas to themselves.
        self.account.note(EXIT)
        os._exit(0)

    def _spawn(self, arena: Arena) -> None:
        # vfork: two processes share one address space for a moment.
        self._take_budget()
        program = self.random.choice(PROGRAMS)
        self.children.add(os.posix_spawn(program[0], program, {}))


def fault_for_ever(actor: Actor, random: Random) -> None:
    """Touch what another thread of the process maps and unmaps."""
    arena = actor.arena
    while True:
        areas = list(arena.areas.values())
        # The other thread has the same interpreter.
        time.sleep(0.002)
        if not areas:
            continue
        area = random.choice(areas)
        page = area.start + random.randrange(area.pages) * PAGE_SIZE
        try:
            arena.write(page, PAGE_SIZE)
        except OSError as error:
            actor.account.note(FAULT, error)
        else:
            actor.account.note(FAULT)


def fork_wide(account: Account) -> None:
    """Fork for ever, with so many VMAs that copying them is most of it."""
    size = WIDE * PAGE_SIZE
    start = sc.mmap(0, size, sc.PROT_READ | sc.PROT_WRITE, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS)
    sc.store(start, size, 1)
    for page in range(start, start + size, 2 * PAGE_SIZE):
        sc.mprotect(page, PAGE_SIZE, sc.PROT_READ)
    while True:
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        account.note(FORK_WIDE)


def act(account: Account, budget: Budget, random: Random, faults: Random) -> None:
    """Do operations for ever, while a thread touches what they are done to."""
    # A child has the thread that forked it alone, and that one holds no lock.
    warnings.simplefilter("ignore", DeprecationWarning)
    actor = Actor(random, account, budget)
    threading.Thread(target=fault_for_ever, args=(actor, faults), daemon=True).start()
    actor.go_on()


def start(work: Callable[[], None]) -> int:
    """Fork one of the first processes, a session of its own, to do work that does not end; its PID."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        die_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # When nobody counts any more, the processes end.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def end(sessions: Sequence[int]) -> None:
    """Kill workers and all that they forked, and reap them."""
    for session in sessions:
        try:
            os.killpg(session, signal.SIGKILL)
        except ProcessLookupError:
            continue
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return
