# SPDX-License-Identifier: GPL-2.0-only
"""From PIDs to address spaces."""

from __future__ import annotations

from dataclasses import dataclass, field

import drgn
from drgn.helpers.linux.pid import find_task, pid_task

from kvirt.errors import KvirtError
from kvirt.filtered import filtered_error, is_filtered
from kvirt.layout import PF_KTHREAD
from kvirt.limits import PID_MAX_LIMIT
from kvirt.mm.xarray import xa_for_each

# How often a table of PIDs that cannot be followed is read while the kernel runs.
TRIES = 5


@dataclass(frozen=True, slots=True)
class Process:
    """A task that has an address space."""

    pid: int
    comm: str
    mm: int
    """Address of the ``struct mm_struct``."""
    others: tuple[int, ...] = ()
    """PIDs of more tasks that have it too: threads, and children of vfork()."""


@dataclass(slots=True)
class Processes:
    """Every process of a kernel, each address space once."""

    found: list[Process] = field(default_factory=list)
    kernel_threads: int = 0
    exited: int = 0
    """Tasks that have given up their address space, and nobody has waited for."""
    troubles: list[str] = field(default_factory=list)
    """What could not be followed, each a half-sentence."""


def find_process(prog: drgn.Program, pid: int) -> Process:
    """Find a process by the PID that the initial namespace gives it.

    :raises KvirtError: if there is none, or it has no address space; the FilteredError among them if the way
        to it was left out of the dump
    """
    try:
        task = find_task(prog, pid)
        if not task:
            raise KvirtError(f"There is no process with PID {pid}: look for it with ps.")
        comm, flags, mm = _comm(task), task.flags.value_(), task.mm.value_()
    except drgn.FaultError as error:
        if is_filtered(error):
            raise filtered_error(prog, f"PID {pid} cannot be looked up", error) from None
        raise KvirtError(
            f"PID {pid} cannot be looked up ({error}): the dump may lack these pages, or the process just "
            "exited; name another one."
        ) from None
    if flags & PF_KTHREAD:
        raise KvirtError(
            f"PID {pid} ({comm}) is a kernel thread and has no address space: name a user process."
        )
    if not mm:
        raise KvirtError(
            f"PID {pid} ({comm}) has exited and has no address space any more: if threads of it still run, "
            "name one of those."
        )
    return Process(pid, comm, mm)


def _comm(task: drgn.Object) -> str:
    comm: str = task.comm.string_().decode(errors="backslashreplace")
    return comm


def for_each_process(prog: drgn.Program, *, moves: bool) -> Processes:
    """Find every address space that a task has, by the table of PIDs (kernel/pid.c).

    Threads are looked at too: a thread group's leader may be dead while the others run.

    :param moves: whether the kernel runs while it is read: then tasks that come and go are no trouble,
        and a table that was torn is read again
    """
    processes = _read_processes(prog, moves)
    for _ in range(TRIES if moves else 0):
        if not processes.troubles:
            break
        processes = _read_processes(prog, moves)
    return processes


def _read_processes(prog: drgn.Program, moves: bool) -> Processes:
    out = Processes()
    # By mm: whether the task is its group's leader, PID, comm.
    tasks: dict[int, list[tuple[bool, int, str]]] = {}
    unreadable: list[int] = []
    try:
        for pid, address in xa_for_each(prog["init_pid_ns"].idr.idr_rt, out.troubles):
            if pid >= PID_MAX_LIMIT:
                out.troubles.append(f"it has entries above {PID_MAX_LIMIT}, which no PID can be")
                break
            try:
                task = pid_task(drgn.Object(prog, "struct pid *", address), prog["PIDTYPE_PID"])
                if not task:
                    continue
                # The initial namespace's PID is the task's own, or this is another's memory by now.
                if task.pid.value_() != pid:
                    unreadable.append(pid)
                    continue
                flags, mm = task.flags.value_(), task.mm.value_()
                if flags & PF_KTHREAD:
                    out.kernel_threads += 1
                elif mm:
                    tasks.setdefault(mm, []).append((task.tgid.value_() == pid, pid, _comm(task)))
                else:
                    out.exited += 1
            except drgn.FaultError:
                unreadable.append(pid)
    except drgn.FaultError as error:
        out.troubles.append(f"it cannot be read ({error})")
    if unreadable and not moves:
        out.troubles.append(
            f"{len(unreadable)} of its tasks cannot be read, the first that of PID {unreadable[0]}"
        )
    for mm, sharing in tasks.items():
        sharing.sort(key=lambda task: (not task[0], task[1]))
        (_, pid, comm), *others = sharing
        out.found.append(Process(pid, comm, mm, tuple(other for _, other, _ in others)))
    out.found.sort(key=lambda process: process.pid)
    return out
