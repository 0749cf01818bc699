# SPDX-License-Identifier: GPL-2.0-only
"""Checks a process by its PID, and says what became of it meanwhile."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import drgn

from kvirt.checks.process import ProcessChecker
from kvirt.errors import KvirtError
from kvirt.filtered import filtered_error, is_filtered
from kvirt.findings import TaskReport, VmaRow
from kvirt.layout import dname_function
from kvirt.mm.address_space import AddressSpace
from kvirt.mm.names import VmaNames
from kvirt.mm.vma import vma_kind
from kvirt.tasks import Process, find_process


def vma_rows(prog: drgn.Program, space: AddressSpace) -> list[VmaRow]:
    """What a table shows of each VMA."""
    names = VmaNames(
        space.records.memory,
        space.layout,
        partial(dname_function, prog),
        space.start_stack,
        space.start_brk,
        space.brk,
    )
    # While a fork copies the tree, entries that it did not come to yet are the parent's.
    own = (vma for vma in space.vmas() if vma.vm_mm == space.address)
    return [VmaRow(vma, vma_kind(vma, space.start_stack), names(vma)) for vma in own]


def list_vmas(checker: ProcessChecker, process: Process) -> tuple[AddressSpace, list[VmaRow]]:
    """The VMAs of a process, without judging them.

    :raises KvirtError: if they cannot be read, or the process is gone
    """
    who = f"PID {process.pid} ({process.comm})"
    fault = None
    try:
        space = checker.read(process.mm)
        rows = vma_rows(checker.prog, space)
    except drgn.FaultError as error:
        fault = error
    if checker.moves and _is_gone(checker.prog, process):
        raise KvirtError(f"{who} exited or called exec while it was read: name another process.")
    if fault is not None and is_filtered(fault):
        raise filtered_error(checker.prog, f"The memory map of {who} cannot be read", fault)
    if fault is not None:
        raise KvirtError(
            f"The memory map of {who} cannot be read ({fault}): the dump may lack it; name another process."
        )
    if space.mm_users == 0:
        raise KvirtError(f"{who} is exiting, and its VMAs are being taken apart: name another process.")
    return space, rows


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Nobody looks for cycles of garbage meanwhile, nor in what is dropped by then.

    There are none in what is read of a process, and the more of it there is, the longer that would take.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_task(
    checker: ProcessChecker,
    process: Process,
    progress: Callable[[int], None] = lambda pages: None,
    *,
    rows: bool = True,
) -> TaskReport:
    """Check one process. Whatever happens to it meanwhile is a sentence in the report.

    :param progress: is told the number of pages seen since the last call
    :param rows: whether to list the VMAs in the report
    """
    with _no_collection():
        return _check_task(checker, process, progress, rows)


def _check_task(
    checker: ProcessChecker, process: Process, progress: Callable[[int], None], rows: bool
) -> TaskReport:
    report = TaskReport(process.pid, process.comm)
    who = f"PID {process.pid} ({process.comm})"
    fault = None
    try:
        result = checker.check(process.mm, progress)
        if rows:
            report.vmas = vma_rows(checker.prog, result.space)
    except drgn.FaultError as error:
        fault = error
    if checker.moves and _is_gone(checker.prog, process):
        # Then freed memory was read, and nothing that was seen there counts.
        checker.forget_latest()
        report.vmas = []
        report.gone = True
        report.incomplete.append(f"{who} exited or called exec while it was read.")
    elif fault is not None and is_filtered(fault):
        report.incomplete.append(
            f"{who} was not checked, because the dump lacks parts of its memory map ({fault})."
        )
    elif fault is not None:
        report.incomplete.append(f"{who}: its memory map cannot be read ({fault}).")
    else:
        report.vma_count = sum(1 for vma in result.space.vmas() if vma.vm_mm == result.space.address)
        report.judged = result.space.mm_users != 0
        report.pages = result.pages
        report.findings = [f if f.pid is not None else replace(f, pid=process.pid) for f in result.findings]
        report.incomplete += [f"{who}: {sentence}." for sentence in result.incomplete]
    return report


def _is_gone(prog: drgn.Program, process: Process) -> bool:
    """Whether no task that had the address space has it still."""
    for pid in (process.pid, *process.others):
        try:
            if find_process(prog, pid).mm == process.mm:
                return False
        except KvirtError:
            continue
    return True
