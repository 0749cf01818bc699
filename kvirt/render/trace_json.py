# SPDX-License-Identifier: GPL-2.0-only
"""The document ``kvirt.trace/1``: one line, and one for each interval where there are any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvirt.trace.counts import (
    AssertionCounts,
    CopyVmaCounts,
    Counts,
    Displacer,
    ProcessCounts,
    RmapCounts,
    SplitVmaCounts,
    Tally,
    Violation,
)


def _rmap(rmap: RmapCounts) -> dict[str, Any]:
    return {
        "walks": dict(rmap.walks),
        "steps": dict(rmap.steps),
        "reasons": dict(rmap.reasons),
        "labels": dict(rmap.labels),
        "callbacks": {
            name: None if tally is None else dict(tally) for name, tally in sorted(rmap.callbacks.items())
        },
        "vmas": dict(rmap.vmas),
    }


def _with(calls: Tally, **more: Tally) -> dict[str, Any]:
    return {**calls, **{name: dict(tally) for name, tally in more.items()}}


def _copy_vma(copy_vma: CopyVmaCounts) -> dict[str, Any]:
    return _with(copy_vma.calls, reasons=copy_vma.reasons, results=copy_vma.results)


def _split_vma(split_vma: SplitVmaCounts) -> dict[str, Any]:
    return _with(split_vma.calls, errors=split_vma.errors)


def _assertions(assertions: Mapping[str, AssertionCounts | None]) -> dict[str, Any]:
    return {id_: None if one is None else {"ok": one.ok, "bad": one.bad} for id_, one in assertions.items()}


def _process(one: ProcessCounts) -> dict[str, Any]:
    return {
        "pid": one.pid,
        "comm": one.comm,
        "rmap": dict(one.rmap),
        "copy_vma": dict(one.copy_vma),
        "split_vma": dict(one.split_vma),
    }


def _displacer(one: Displacer) -> dict[str, Any]:
    return {
        "pid": one.pid,
        "comm": one.comm,
        "vmas": one.vmas,
        "rmap_fallbacks": one.rmap_fallbacks,
        "user": list(one.user),
        "kernel": list(one.kernel),
    }


def _violation(one: Violation) -> dict[str, Any]:
    return {
        "id": one.id,
        "pid": one.pid,
        "tid": one.tid,
        "comm": one.comm,
        "vma": {"start": hex(one.start), "end": hex(one.end)},
        "address": hex(one.address),
        "expected": hex(one.expected),
        "actual": hex(one.actual),
        "stack": list(one.stack),
    }


def trace_document(counts: Counts, *, top: int, stacks: bool) -> str:
    """The document, without a newline in it.

    :param top: how many processes and places to name
    :param stacks: whether it was asked who displaced VMAs
    """
    document: dict[str, Any] = {
        "schema": "kvirt.trace/1",
        "seconds": round(counts.seconds, 3),
        "probes": dict(sorted(counts.probes.items())),
        "rmap": None if counts.rmap is None else _rmap(counts.rmap),
        "copy_vma": None if counts.copy_vma is None else _copy_vma(counts.copy_vma),
        "split_vma": None if counts.split_vma is None else _split_vma(counts.split_vma),
        "assertions": _assertions(counts.assertions),
        "lost": dict(counts.lost),
        "processes": [_process(one) for one in counts.processes[:top]],
    }
    if stacks:
        document["displacers"] = [_displacer(one) for one in counts.displacers[:top]]
    document["violations"] = [_violation(one) for one in counts.violations]
    document["violations_untold"] = counts.violations_untold
    return json.dumps(document)
