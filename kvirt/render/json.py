# SPDX-License-Identifier: GPL-2.0-only
"""The JSON documents; their schemas are shipped in kvirt/schemas."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from typing import Any

from kvirt.findings import Finding, PageCounts, Report, TaskReport, VmaRow
from kvirt.klog import Complaint, KernelLog
from kvirt.layout import Layout
from kvirt.mm.vma import displacement, permissions
from kvirt.target import Target


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of a document.

    :param name: "kvirt.check/1", "kvirt.checks/1", "kvirt.trace/1" or "kvirt.vmas/1"
    """
    path = resources.files("kvirt") / "schemas" / f"{name.replace('/', '-')}.json"
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def kernel_members(layout: Layout) -> dict[str, Any]:
    """What every document says of the kernel."""
    return {"release": layout.release, "arch": layout.arch, "scheme": str(layout.scheme)}


def _target(target: Target) -> dict[str, Any]:
    return {"kind": str(target.kind), "location": target.location, "types": target.types}


def _vma(row: VmaRow) -> dict[str, Any]:
    vma = row.vma
    return {
        "start": hex(vma.vm_start),
        "end": hex(vma.vm_end),
        "flags": permissions(vma),
        "kind": str(row.kind),
        "vm_pgoff": hex(vma.vm_pgoff),
        "anon_pgoff": hex(vma.anon_pgoff),
        "displacement": displacement(vma),
        "faulted": vma.anon_vma != 0,
        "name": row.name,
    }


def _finding(finding: Finding) -> dict[str, Any]:
    out: dict[str, Any] = {"id": finding.id, "severity": str(finding.severity)}
    if finding.pid is not None:
        out["pid"] = finding.pid
    if finding.vma is not None:
        out["vma"] = {"start": hex(finding.vma[0]), "end": hex(finding.vma[1])}
    for name in ("address", "expected", "actual"):
        value = getattr(finding, name)
        if value is not None:
            out[name] = hex(value)
    if finding.pages != 1:
        out["pages"] = finding.pages
    out["message"] = finding.message
    return out


def _pages(pages: PageCounts) -> dict[str, Any]:
    return {
        "present": pages.present,
        "anon": pages.anon,
        "checked": pages.checked,
        "verified": pages.verified,
        "unverified": dict(sorted(pages.unverified.items())),
        "swapcache": pages.swapcache,
        "skipped": dict(sorted(pages.skipped.items())),
    }


def _task(task: TaskReport) -> dict[str, Any]:
    out: dict[str, Any] = {"pid": task.pid, "comm": task.comm}
    # What was not looked at is left out: it is not nothing.
    if task.judged:
        out["vmas"] = [_vma(row) for row in task.vmas]
        out["pages"] = _pages(task.pages)
    return out


def _complaint(one: Complaint) -> dict[str, Any]:
    out: dict[str, Any] = {"seconds": one.nanoseconds / 1e9}
    for name, value in (("tid", one.tid), ("comm", one.comm), ("pid", one.pid)):
        if value is not None:
            out[name] = value
    if one.vma is not None:
        out["vma"] = {"start": hex(one.vma[0]), "end": hex(one.vma[1])}
    if one.address is not None:
        out["address"] = hex(one.address)
    out["text"] = one.text
    return out


def _log(log: KernelLog) -> dict[str, Any]:
    out: dict[str, Any] = {"complaints": [_complaint(one) for one in log.complaints]}
    out["omitted"] = log.omitted + log.others
    if log.unreadable is not None:
        out["unreadable"] = log.unreadable
    return out


def _dump(document: object) -> str:
    return json.dumps(document, indent=1)


def _members(document: dict[str, Any]) -> str:
    """The members of an object, without its braces."""
    return _dump(document).removeprefix("{\n").removesuffix("\n}")


def check_document(
    target: Target,
    layout: Layout,
    report: Report,
    tasks: Iterable[TaskReport],
    log: KernelLog | None = None,
) -> Iterator[str]:
    """The document ``kvirt.check/1``, in pieces.

    :param report: what *tasks* add up to; looked at only when these are at their end
    :param tasks: written one after the other, so that no two need be kept
    :param log: what the kernel said itself, if that was looked at
    """
    head = {"schema": "kvirt.check/1", "kernel": kernel_members(layout), "target": _target(target)}
    yield "{\n" + _members(head) + ',\n "tasks": ['
    separator = "\n"
    for task in tasks:
        if task.gone:
            continue
        yield separator + textwrap.indent(_dump(_task(task)), "  ")
        separator = ",\n"
    omitted: dict[str, dict[str, int]] = {}
    for (id_, severity), number in sorted(report.omitted().items()):
        omitted.setdefault(id_, {})[str(severity)] = number
    tail = {
        "totals": {
            "processes": report.processes,
            "gone": report.gone,
            "vmas": report.vmas,
            "pages": _pages(report.pages),
            "misindexed": report.misindexed,
        },
        "findings": [_finding(finding) for finding in report.findings()],
        "omitted": omitted,
        "incomplete": report.incomplete,
        **({} if log is None else {"log": _log(log)}),
        "summary": {str(severity): n for severity, n in report.summary().items()},
    }
    yield "\n ],\n" + _members(tail) + "\n}\n"


def vmas_document(target: Target, layout: Layout, pid: int, comm: str, rows: Sequence[VmaRow]) -> str:
    """The document ``kvirt.vmas/1``."""
    return _dump(
        {
            "schema": "kvirt.vmas/1",
            "kernel": kernel_members(layout),
            "target": _target(target),
            "pid": pid,
            "comm": comm,
            "vmas": [_vma(row) for row in rows],
        }
    )
