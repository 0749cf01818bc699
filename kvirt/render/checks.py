# SPDX-License-Identifier: GPL-2.0-only
"""The invariants themselves: what they say, and who relies on them."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

from kvirt.checks.registry import Check
from kvirt.layout import Layout
from kvirt.render.json import kernel_members
from kvirt.render.text import terminal_width

# Blanks between columns.
_GAP = 2
NOT_HERE = "(not this kernel)"


def checks_table(checks: Sequence[Check], layout: Layout | None) -> str:
    """All invariants in a table.

    :param layout: of the kernel that was named, if one was: those that mean nothing on it are marked
    """
    head = ("invariant", "severity", "kernels", "what must hold; for whom")
    rows = [(check.id, str(check.severity), check.kernels) for check in checks]
    widths = [max(len(row[i]) for row in (head, *rows)) + _GAP for i in range(3)]
    room = terminal_width() - sum(widths)

    def line(cells: Sequence[str], text: str) -> str:
        return "".join(f"{c:{w}}" for c, w in zip(cells, widths, strict=True)) + text

    lines = [line(head[:3], head[3]), line(["-" * (w - _GAP) for w in widths], "-" * room)]
    for check, row in zip(checks, rows, strict=True):
        told = [] if layout is None or check.applies(layout) else [NOT_HERE]
        text = [*told, *textwrap.wrap(check.says, room, break_on_hyphens=False)]
        text += textwrap.wrap(
            f"for {check.relied_on}",
            room,
            initial_indent="  ",
            subsequent_indent="  ",
            break_on_hyphens=False,
        )
        lines.append(line(row, text[0]))
        lines += [line([""] * 3, more) for more in text[1:]]
    meanings = {check.kernels: check.kernels_meaning for check in checks if check.kernels_meaning}
    lines += ["", *(f"{kernels}: {meaning}" for kernels, meaning in meanings.items())]
    return "\n".join(lines).rstrip()


def kernels_of(check: Check) -> str:
    """Which kernels an invariant is about."""
    return f"{check.kernels} ({check.kernels_meaning})" if check.kernels_meaning else check.kernels


def explanation(check: Check, layout: Layout | None) -> str:
    """One invariant, with all that is to be said of it."""
    parts = [f"{check.id}: {check.severity}; kernels: {kernels_of(check)}"]
    if layout is not None and not check.applies(layout):
        parts[0] += f" {NOT_HERE}"
    parts += [check.says, f"Relied on by {check.relied_on}.", *check.explanation]
    return "\n\n".join(textwrap.fill(part, terminal_width()) for part in parts)


def checks_document(checks: Sequence[Check], layout: Layout | None) -> str:
    """The document ``kvirt.checks/1``."""
    document: dict[str, Any] = {"schema": "kvirt.checks/1"}
    if layout is not None:
        document["kernel"] = kernel_members(layout)
    document["checks"] = []
    for check in checks:
        members: dict[str, Any] = {
            "id": check.id,
            "severity": str(check.severity),
            "kernels": kernels_of(check),
            "says": check.says,
            "relied_on": check.relied_on,
            "explanation": check.explanation,
        }
        if layout is not None:
            members["applies"] = check.applies(layout)
        document["checks"].append(members)
    return json.dumps(document, indent=1)
