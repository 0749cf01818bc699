# SPDX-License-Identifier: GPL-2.0-only
"""From a PID to an address space."""

from __future__ import annotations

from dataclasses import dataclass

import drgn
from drgn.helpers.linux.pid import find_task

from kvirt.errors import KvirtError
from kvirt.layout import PF_KTHREAD


@dataclass(frozen=True, slots=True)
class Process:
    """A task that has an address space."""

    pid: int
    comm: str
    mm: int
    """Address of the ``struct mm_struct``."""


def find_process(prog: drgn.Program, pid: int) -> Process:
    """Find a process by the PID that the initial namespace gives it.

    :raises KvirtError: if there is none, or it has no address space
    """
    try:
        task = find_task(prog, pid)
        if not task:
            raise KvirtError(f"There is no process with PID {pid}: look for it with ps.")
        comm = task.comm.string_().decode(errors="backslashreplace")
        flags, mm = task.flags.value_(), task.mm.value_()
    except drgn.FaultError as error:
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
