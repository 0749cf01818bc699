# SPDX-License-Identifier: GPL-2.0-only
"""Tables for people: the answer first, and no wider than the terminal."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence

import tabulate
from tabulate import DataRow, Line, TableFormat

from kvirt.errors import printable
from kvirt.findings import Finding, Report, Severity, TaskReport, VmaRow
from kvirt.layout import Layout, Scheme
from kvirt.mm.vma import displacement, permissions, vma_is_cow_mapping
from kvirt.target import Target

# In a pipe there is no terminal to ask.
WIDTH = 100
# Narrower than this a table of VMAs cannot be.
WIDTH_MIN = 80

_SCHEMES = {
    Scheme.ANON_PGOFF: "anonymous folios are indexed by the VMA's anon pgoff",
    Scheme.VIRT_PGOFF: "anonymous folios are indexed by the VMA's virt pgoff",
    Scheme.LEGACY: "legacy: anonymous folios are indexed by vm_pgoff",
}


def plural(number: int, noun: str) -> str:
    """ "1 page", "2 pages" """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def terminal_width() -> int:
    """Columns to use."""
    return max(WIDTH_MIN, shutil.get_terminal_size((WIDTH, 24)).columns)


def _shorten(text: str, width: int) -> str:
    """Cut a path in front, where it says least."""
    if len(text) > width:
        text = text.removesuffix(" (deleted)")
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def kernel_line(target: Target, layout: Layout) -> str:
    """Which kernel was read, how, and by which offset it indexes."""
    how = {
        "live": "live",
        "core": f"vmcore {target.location}",
        "qemu": f"QEMU guest at {target.location}",
    }[target.kind]
    return f"Linux {layout.release}, {how}, types from {target.types.upper()}\n{_SCHEMES[layout.scheme]}"


def _short_count(number: int) -> str:
    """A signed number in at most seven characters; the exact one can be had from the row or the JSON."""
    if abs(number) < 1_000_000:
        return f"{number:+d}" if number else "0"
    value = float(number)
    for unit in ("M", "G", "T", "P"):
        value = value / 1000 if unit != "M" else value / 1e6
        if abs(value) < 1000:
            return f"{value:+.1f}{unit}"
    return f"{value:+.0f}P"


# One blank between columns: two would not leave room for names.
_FORMAT = TableFormat(
    lineabove=None,
    linebelowheader=Line("", "-", " ", ""),
    linebetweenrows=None,
    linebelow=None,
    headerrow=DataRow("", " ", ""),
    datarow=DataRow("", " ", ""),
    padding=0,
    with_header_hide=None,
)


def vma_table(layout: Layout, rows: Sequence[VmaRow], marks: Counter[int] | None = None) -> str:
    """The VMAs of a process.

    :param marks: number of findings by start of the VMA; those VMAs get a mark
    """
    two = layout.scheme is not Scheme.LEGACY
    second = {Scheme.ANON_PGOFF: "anon pgoff", Scheme.VIRT_PGOFF: "virt pgoff"}.get(layout.scheme, "")
    table = []
    previous = ""
    for row in rows:
        vma = row.vma
        # On a legacy kernel a file mapping's offset has nothing to do with its address.
        meant = two or vma_is_cow_mapping(vma)
        name = printable(row.name)
        line = [
            f"{vma.vm_start:x}-{vma.vm_end:x}" + ("!" if marks and marks[vma.vm_start] else ""),
            permissions(vma),
            str(row.kind),
            f"{vma.vm_pgoff:x}",
        ]
        if two:
            line.append(f"{vma.anon_pgoff:x}")
        line += [
            _short_count(displacement(vma)) if meant else "-",
            "yes" if vma.anon_vma else "no",
            # The same file's next mapping: a ditto keeps the eye on what differs.
            '"' if name and name == previous else name,
        ]
        previous = name
        table.append(line)
    headers = ["range", "perm", "kind", "vm_pgoff"] + ([second] if two else [])
    headers += ["displaced", "faulted", "name"]
    align = ["left", "left", "left", "right"] + (["right"] if two else []) + ["right", "left", "left"]
    used = sum(max(len(line[i]) for line in [headers, *table]) + 1 for i in range(len(headers) - 1))
    room = max(8, terminal_width() - used)
    for line in table:
        line[-1] = _shorten(line[-1], room)
    # Headers get no extra width beyond their text.
    tabulate.MIN_PADDING = 0
    return tabulate.tabulate(table, headers, tablefmt=_FORMAT, colalign=align, disable_numparse=True)


def _kind_table(task: TaskReport) -> str:
    """How many VMAs of each kind there are, and how many are displaced."""
    total: Counter[str] = Counter(str(row.kind) for row in task.vmas)
    faulted: Counter[str] = Counter(str(row.kind) for row in task.vmas if row.vma.anon_vma)
    displaced: Counter[str] = Counter(
        str(row.kind) for row in task.vmas if row.vma.anon_vma and displacement(row.vma)
    )
    return (
        ", ".join(
            f"{n} {kind}" + (f" ({displaced[kind]} displaced)" if displaced[kind] else "")
            for kind, n in sorted(total.items())
        )
        + f"; {plural(sum(faulted.values()), 'VMA')} faulted"
    )


def _where(finding: Finding) -> str:
    at = ""
    if finding.address is not None:
        at = f" at {finding.address:#x}"
    elif finding.vma is not None:
        at = f" in {finding.vma[0]:x}-{finding.vma[1]:x}"
    if finding.pages > 1:
        at += f" and {plural(finding.pages - 1, 'more page')} of this VMA"
    return at


def _wrap(text: str, width: int, indent: str) -> str:
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += " " + word
        else:
            lines.append(indent + word if lines else word)
    return "\n".join(lines)


def _findings(report: Report) -> str:
    """All findings, the worst first."""
    order = list(Severity)
    indent = " " * 10
    lines = []
    for f in sorted(report.findings(), key=lambda f: order.index(f.severity)):
        who = f"PID {f.pid}: " if f.pid is not None and len(report.tasks) > 1 else ""
        text = _wrap(f"{who}{f.id}{_where(f)}: {f.message}", terminal_width() - len(indent), "")
        first, *rest = text.splitlines()
        lines.append(f"{f.severity.upper():{len(indent)}}{first}")
        lines += [indent + line for line in rest]
        if f.vma is not None and f.address is not None:
            lines.append(f"{indent}in the VMA {f.vma[0]:x}-{f.vma[1]:x}")
        if f.expected is not None and f.actual is not None:
            lines.append(f"{indent}expected {f.expected:#x}, found {f.actual:#x}")
    return "\n".join(lines)


def verdict(report: Report) -> str:
    """The answer, in one line."""
    summary = report.summary()
    checked = sum(task.pages.checked for task in report.tasks)
    vmas = sum(len(task.vmas) for task in report.tasks)
    looked = f"{plural(vmas, 'VMA')} and {plural(checked, 'page')} checked"
    extra = [
        plural(summary[s], noun)
        for s, noun in ((Severity.WARNING, "warning"), (Severity.TRANSIENT, "transient finding"))
        if summary[s]
    ]
    tail = f" ({', '.join(extra)})" if extra else ""
    if summary[Severity.ERROR]:
        return f"INCONSISTENT: {plural(summary[Severity.ERROR], 'error')}{tail}; {looked}."
    if report.incomplete():
        return f"INCOMPLETE: no error found, but not everything could be checked{tail}; {looked}."
    return f"CONSISTENT: no errors{tail}; {looked}."


def _task(layout: Layout, task: TaskReport, vmas: bool) -> str:
    who = f"PID {task.pid} ({printable(task.comm)})"
    parts = []
    if task.vmas:
        pages = task.pages
        parts.append(f"{who}: {plural(len(task.vmas), 'VMA')}: {_kind_table(task)}")
        parts.append(
            f"pages: {pages.present:,} present, of which {pages.checked:,} checked "
            f"({pages.anon:,} of them anonymous)"
        )
        if pages.skipped:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in pages.skipped.most_common())
            parts.append(f"skipped: {reasons}")
    parts = [_wrap(part, terminal_width(), "  ") for part in parts]
    parts += [_wrap(printable(sentence), terminal_width(), "  ") for sentence in task.incomplete]
    if vmas and task.vmas:
        marks = Counter(f.vma[0] for f in task.findings if f.vma is not None)
        parts.append("\n" + vma_table(layout, task.vmas, marks))
    return "\n".join(parts)


def check_table(target: Target, layout: Layout, report: Report, *, vmas: bool = True) -> str:
    """What ``check-pid`` prints."""
    parts = [verdict(report), kernel_line(target, layout)]
    if report.findings():
        parts.append("\n" + _findings(report))
    parts += ["\n" + _task(layout, task, vmas) for task in report.tasks]
    if vmas and sum(len(task.vmas) for task in report.tasks) > 40:
        # The first line has scrolled away.
        parts.append("\n" + verdict(report))
    return "\n".join(parts)


def vmas_table(target: Target, layout: Layout, pid: int, comm: str, rows: Sequence[VmaRow]) -> str:
    """What ``vmas`` prints."""
    displaced = sum(1 for row in rows if row.vma.anon_vma and displacement(row.vma))
    head = f"PID {pid} ({printable(comm)}): {plural(len(rows), 'VMA')}, {displaced} faulted and displaced"
    return "\n".join([head, kernel_line(target, layout), "", vma_table(layout, rows)])
