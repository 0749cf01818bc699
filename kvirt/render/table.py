# SPDX-License-Identifier: GPL-2.0-only
"""Tables for people: the answer first, and no wider than the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvirt.errors import printable
from kvirt.findings import Finding, PageCounts, Report, Severity, TaskReport, VmaRow
from kvirt.klog import Complaint, KernelLog
from kvirt.layout import Layout
from kvirt.mm.vma import displacement, permissions, vma_is_cow_mapping
from kvirt.render.text import columns, plural, terminal_width, wrap
from kvirt.scheme import Scheme
from kvirt.target import Target

_SCHEMES = {
    Scheme.ANON_PGOFF: "anonymous folios are indexed by the VMA's anon pgoff",
    Scheme.VIRT_PGOFF: "anonymous folios are indexed by the VMA's virt pgoff",
    Scheme.LEGACY: "legacy: anonymous folios are indexed by vm_pgoff",
}


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
    return columns(table, headers, align)


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


# Of findings of one invariant in one process, so many are told in full. Those that accuse nobody need
# no more than an example.
ALIKE_SHOWN = {Severity.ERROR: 3, Severity.WARNING: 3, Severity.INFO: 1, Severity.TRANSIENT: 1}


def _in_full(f: Finding) -> list[str]:
    indent = " " * 10
    text = wrap(f"{f.id}{_where(f)}: {f.message}", terminal_width() - len(indent), "")
    first, *rest = text.splitlines()
    lines = [f"{f.severity.upper():{len(indent)}}{first}"]
    lines += [indent + line for line in rest]
    if f.vma is not None and f.address is not None:
        lines.append(f"{indent}in the VMA {f.vma[0]:x}-{f.vma[1]:x}")
    if f.expected is not None and f.actual is not None:
        lines.append(f"{indent}expected {f.expected:#x}, found {f.actual:#x}")
    return lines


def _alike(findings: list[Finding]) -> list[str]:
    """Findings of one invariant in one process: some in full, each of another VMA, and how many more."""
    nth: Counter[tuple[int, int] | None] = Counter()
    numbered = []
    for f in findings:
        numbered.append((nth[f.vma], f))
        nth[f.vma] += 1
    ordered = [f for _, f in sorted(numbered, key=lambda pair: pair[0])]
    shown = ALIKE_SHOWN[findings[0].severity]
    lines = [line for f in ordered[:shown] for line in _in_full(f)]
    more = ordered[shown:]
    if more:
        text = f"and {len(more):,} more {more[0].id}"
        ranges = sorted({f.vma for f in more if f.vma is not None})
        if ranges:
            text += f" in {plural(len(ranges), 'VMA')} between {ranges[0][0]:x} and {ranges[-1][1]:x}"
        pages = sum(f.pages for f in more if f.address is not None)
        if pages > len(more):
            text += f", {pages:,} pages in all"
        lines += [" " * 10 + line for line in wrap(text, terminal_width() - 10, "").splitlines()]
    return lines


def _who(report: Report, pid: int | None) -> str:
    if pid is None:
        return "Several processes"
    # What processes share is told with the first that was checked, and may be about another.
    comm = report.comms.get(pid)
    return f"PID {pid}" if comm is None else f"PID {pid} ({printable(comm)})"


def _findings(report: Report) -> str:
    """The findings by process and invariant, the worst first."""
    processes: dict[int | None, dict[tuple[str, Severity], list[Finding]]] = {}
    for f in report.findings():
        processes.setdefault(f.pid, {}).setdefault((f.id, f.severity), []).append(f)
    parts = []
    for pid, groups in processes.items():
        lines = [line for group in groups.values() for line in _alike(group)]
        if report.processes > 1:
            who = _who(report, pid)
            lines.insert(0, f"{who}:")
        parts.append("\n".join(lines))
    omitted = report.omitted()
    if omitted:
        what = ", ".join(f"{n:,} {id_} ({severity})" for (id_, severity), n in omitted.most_common())
        number = plural(omitted.total(), "more finding")
        text = f"{number}, counted and not listed: {what}; --max-findings lists more"
        parts.append(wrap(text, terminal_width(), "  "))
    return ("\n\n" if report.processes > 1 else "\n").join(parts)


def verdict(report: Report) -> str:
    """The answer, in one line if it fits."""
    summary = report.summary()
    looked = f"{plural(report.vmas, 'VMA')} and {plural(report.pages.checked, 'page')} checked"
    if report.processes > 1:
        looked = f"{report.processes:,} processes, {looked}"
    extra = [
        plural(summary[s], noun)
        for s, noun in ((Severity.WARNING, "warning"), (Severity.TRANSIENT, "transient finding"))
        if summary[s]
    ]
    tail = f" ({', '.join(extra)})" if extra else ""
    if summary[Severity.ERROR]:
        answer = f"INCONSISTENT: {plural(summary[Severity.ERROR], 'error')}"
    elif report.incomplete_count:
        answer = "INCOMPLETE: no error found, but not everything could be checked"
    else:
        answer = "CONSISTENT: no errors"
    return wrap(f"{answer}{tail}; {looked}.", terminal_width(), "  ")


def _reasons(skipped: Counter[str]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in skipped.most_common())


def _verified(report: Report) -> str:
    """What share of the anonymous pages was verified; never rounded up to all of them."""
    pages = report.pages
    wrong = f", and {report.misindexed:,} of these wrong" if report.misindexed else ""
    missing = pages.unverified.total()
    seen = pages.verified + missing
    if not seen:
        return "anonymous pages: none were seen"
    if not missing:
        return f"anonymous pages: all {seen:,} verified{wrong}"
    permille = pages.verified * 1000 // seen
    return (
        f"anonymous pages: {permille // 10}.{permille % 10}% of {seen:,} verified{wrong}; "
        f"not verified: {_reasons(pages.unverified)}"
    )


def _pages(pages: PageCounts) -> list[str]:
    lines = [
        f"pages: {pages.present:,} present, of which {pages.checked:,} checked "
        f"({pages.anon:,} of them anonymous)"
    ]
    if pages.swapcache:
        lines.append(f"in swap, and checked in the swap cache: {pages.swapcache:,}")
    if pages.skipped:
        lines.append(f"skipped: {_reasons(pages.skipped)}")
    return lines


def _task(layout: Layout, task: TaskReport, vmas: bool) -> str:
    who = f"PID {task.pid} ({printable(task.comm)})"
    parts = []
    if task.vmas:
        parts.append(f"{who}: {plural(task.vma_count, 'VMA')}: {_kind_table(task)}")
        parts += _pages(task.pages)
    parts += [printable(sentence) for sentence in task.incomplete]
    parts = [wrap(part, terminal_width(), "  ") for part in parts]
    if vmas and task.vmas:
        marks = Counter(f.vma[0] for f in task.findings if f.vma is not None)
        parts.append("\n" + vma_table(layout, task.vmas, marks))
    return "\n".join(parts)


# Complaints of the kernel that are told in full.
COMPLAINTS_SHOWN = 10


def _complaint(one: Complaint) -> str:
    seconds, rest = divmod(one.nanoseconds, 10**9)
    stamp = f"[{seconds:5}.{rest // 1000:06}] "
    comm = "" if one.comm is None else f" ({one.comm})"
    if one.pid is not None:
        who = f"in PID {one.pid}{comm}"
        if one.vma is not None:
            who += f", in its VMA {one.vma[0]:x}-{one.vma[1]:x}"
    else:
        who = "in no thread" if one.tid is None else f"in thread {one.tid}{comm}"
    indent = " " * len(stamp)
    lines = []
    for line in (*one.text, who):
        lines += wrap(printable(line), terminal_width() - len(indent), "").splitlines()
    return stamp + ("\n" + indent).join(lines)


def _log(log: KernelLog | None) -> list[str]:
    """The kernel's own words, if it had any."""
    if log is None:
        return []
    parts = []
    if log.complaints:
        number = plural(len(log.complaints), "time")
        parts.append(f"\nThe kernel's log complains of memory {number}; that may be long ago:")
        parts += [_complaint(one) for one in log.complaints[:COMPLAINTS_SHOWN]]
    more = len(log.complaints[COMPLAINTS_SHOWN:]) + log.omitted
    if more:
        parts.append(f"and {plural(more, 'more time')}")
    if log.others:
        number = plural(log.others, "time")
        text = (
            f"The kernel's log complains of memory {number} without naming what was checked: see check-all."
        )
        parts.append("\n" + wrap(text, terminal_width(), "  "))
    if log.unreadable is not None:
        parts.append("\n" + wrap(printable(log.unreadable), terminal_width(), "  "))
    return parts


def check_table(
    target: Target,
    layout: Layout,
    report: Report,
    tasks: Sequence[TaskReport],
    log: KernelLog | None = None,
    *,
    vmas: bool = True,
) -> str:
    """What ``check-pid`` prints.

    :param report: what *tasks* add up to
    :param log: what the kernel said itself, if that was looked at
    """
    parts = [verdict(report), kernel_line(target, layout)]
    if report.findings() or report.omitted():
        parts.append("\n" + _findings(report))
    parts += _log(log)
    parts += ["\n" + _task(layout, task, vmas) for task in tasks]
    if vmas and sum(len(task.vmas) for task in tasks) > 40:
        # The first line has scrolled away.
        parts.append("\n" + verdict(report))
    return "\n".join(parts)


def machine_table(target: Target, layout: Layout, report: Report, log: KernelLog | None = None) -> str:
    """What ``check-all`` prints."""
    lines = [_verified(report), *_pages(report.pages)]
    if report.gone:
        lines.append(f"not judged, because gone before they were read: {plural(report.gone, 'process')}")
    lines += [printable(sentence) for sentence in report.incomplete]
    beyond = report.incomplete_count - len(report.incomplete)
    if beyond:
        lines.append(f"and {beyond:,} more like these; --max-findings lists more")
    parts = [verdict(report), kernel_line(target, layout), ""]
    parts += [wrap(line, terminal_width(), "  ") for line in lines]
    if report.findings() or report.omitted():
        parts.append("\n" + _findings(report))
    parts += _log(log)
    return "\n".join(parts)


def vmas_table(target: Target, layout: Layout, pid: int, comm: str, rows: Sequence[VmaRow]) -> str:
    """What ``vmas`` prints."""
    displaced = sum(1 for row in rows if row.vma.anon_vma and displacement(row.vma))
    head = f"PID {pid} ({printable(comm)}): {plural(len(rows), 'VMA')}, {displaced} faulted and displaced"
    return "\n".join([head, kernel_line(target, layout), "", vma_table(layout, rows)])
