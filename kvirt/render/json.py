# SPDX-License-Identifier: GPL-2.0-only
"""The JSON documents; their schemas are shipped in kvirt/schemas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from kvirt.findings import Finding, Report, TaskReport, VmaRow
from kvirt.layout import Layout
from kvirt.mm.vma import displacement, permissions
from kvirt.target import Target


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of a document.

    :param name: "kvirt.check/1" or "kvirt.vmas/1"
    """
    path = resources.files("kvirt") / "schemas" / f"{name.replace('/', '-')}.json"
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def _kernel(layout: Layout) -> dict[str, Any]:
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


def _task(task: TaskReport) -> dict[str, Any]:
    pages = task.pages
    return {
        "pid": task.pid,
        "comm": task.comm,
        "vmas": [_vma(row) for row in task.vmas],
        "pages": {
            "present": pages.present,
            "anon": pages.anon,
            "checked": pages.checked,
            "skipped": dict(sorted(pages.skipped.items())),
        },
    }


def _dump(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1)


def check_document(target: Target, layout: Layout, report: Report) -> str:
    """The document ``kvirt.check/1``."""
    return _dump(
        {
            "schema": "kvirt.check/1",
            "kernel": _kernel(layout),
            "target": _target(target),
            "tasks": [_task(task) for task in report.tasks],
            "findings": [_finding(finding) for finding in report.findings()],
            "incomplete": report.incomplete(),
            "summary": {str(severity): n for severity, n in report.summary().items()},
        }
    )


def vmas_document(target: Target, layout: Layout, pid: int, comm: str, rows: Sequence[VmaRow]) -> str:
    """The document ``kvirt.vmas/1``."""
    return _dump(
        {
            "schema": "kvirt.vmas/1",
            "kernel": _kernel(layout),
            "target": _target(target),
            "pid": pid,
            "comm": comm,
            "vmas": [_vma(row) for row in rows],
        }
    )
