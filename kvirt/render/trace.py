# SPDX-License-Identifier: GPL-2.0-only
"""What ``kvirt trace`` prints for people: the answer first. ``n/a`` is unknown, ``-`` a share of nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from kvirt.errors import printable
from kvirt.render.text import columns, plural, terminal_width, wrap
from kvirt.trace.counts import Counts, Displacer, RmapCounts, Tally, Violation, hit_rate

NA = "n/a"
# What can be asked for: the member of Counts, and what it is called in tables.
SECTIONS = {"rmap": "rmap", "copy_vma": "copy_vma", "split_vma": "__split_vma"}


def share(rate: float | None) -> str:
    """A part of something in percent; never rounded up to all of it."""
    if rate is None:
        return "-"
    text = f"{rate:.1%}"
    return "99.9%" if text == "100.0%" and rate < 1 else text


def _number(number: int | None) -> str:
    return NA if number is None else f"{number:,}"


def _list(tally: Mapping[str, int | None]) -> str:
    """What did happen, the most frequent first, and what nobody knows."""
    known = sorted(((n, name) for name, n in tally.items() if n), key=lambda pair: -pair[0])
    parts = [f"{n:,} {name}" for n, name in known]
    parts += [f"{NA} {name}" for name, n in tally.items() if n is None]
    return ", ".join(parts) or "none"


def _section(counts: Counts, name: str) -> Tally | None:
    """Hits and fallbacks of one of :data:`SECTIONS`."""
    if name == "rmap":
        return None if counts.rmap is None else counts.rmap.steps
    section = counts.copy_vma if name == "copy_vma" else counts.split_vma
    return None if section is None else section.calls


def absent(counts: Counts) -> dict[str, str]:
    """What is not probed, and why: a sentence by the function's name."""
    return {
        name: state.removeprefix("absent: ")
        for name, state in counts.probes.items()
        if state.startswith("absent: ")
    }


def doubts(counts: Counts) -> list[str]:
    """What was lost: sentences for stderr."""
    out = [f"Not counted: {plural(n, 'event')} ({why})." for why, n in sorted(counts.lost.items())]
    if counts.violations_untold:
        out.append(
            f"Of {plural(counts.violations_untold, 'violation')} nothing more is known: they came too fast."
        )
    return out


def _rates(counts: Counts, asked: Iterable[str]) -> str:
    """The share of hits, by what was asked for."""
    parts = []
    for name in asked:
        tally = _section(counts, name)
        if tally is None:
            parts.append(f"{SECTIONS[name]} {NA}")
            continue
        total = tally["hit"] + tally["fallback"]
        noun = "step" if name == "rmap" else "call"
        rate = hit_rate(tally)
        hits = "no" if rate is None else f"{share(rate)} hits in"
        parts.append(f"{SECTIONS[name]} {hits} {plural(total, noun) if total else noun + 's'}")
    return ", ".join(parts)


def answer(counts: Counts, asked: Iterable[str]) -> str:
    """Whether the assertions held, and how often the fast path would hit."""
    tested = counts.bad + sum(one.ok for one in counts.assertions.values() if one is not None)
    if counts.bad:
        verdict = f"INCONSISTENT: {plural(counts.bad, 'violation')} in {plural(tested, 'assertion')}"
    elif counts.lost or absent(counts):
        verdict = f"INCOMPLETE: no violation in {plural(tested, 'assertion')}, but not everything was seen"
    elif tested:
        verdict = f"CONSISTENT: no violation in {plural(tested, 'assertion')}"
    else:
        verdict = "Nothing happened that could be asserted"
    return wrap(f"{verdict}; {_rates(counts, asked)}.", terminal_width(), "  ")


def _tally_row(name: str, tally: Tally | None, members: Sequence[str]) -> list[str]:
    """A name, hits and fallbacks, what share the hits are, and more members."""
    if tally is None:
        return [name, *[NA] * (3 + len(members))]
    return [
        name,
        _number(tally["hit"]),
        _number(tally["fallback"]),
        share(hit_rate(tally)),
        *(_number(tally[member]) for member in members),
    ]


def _tally_table(what: str, rows: Mapping[str, Tally | None], members: Sequence[str]) -> str:
    return columns(
        [_tally_row(name, tally, members) for name, tally in rows.items()],
        [what, "hit", "fallback", "hit%", *members],
        ["left", *["right"] * (3 + len(members))],
    )


def _rmap(rmap: RmapCounts) -> Iterator[str]:
    yield f"rmap walks: {_list(rmap.walks)}"
    if any(rmap.vmas.values()):
        ordered = sorted(rmap.vmas.items(), key=lambda item: int(item[0].rstrip("+").partition("-")[0]))
        number = ", ".join(f"{walks:,} x {vmas}" for vmas, walks in ordered if walks)
        yield f"VMAs that a walk came to: {number}"
    shared, alias = rmap.labels["shared"], rmap.labels["alias"]
    if shared or alias:
        yield f"of all steps {shared:,} with folios that came by fork; of the fallbacks {alias:,} aliases"
    # Those that were not called say nothing, those that cannot be probed must not be taken for them.
    called = {n: t for n, t in rmap.callbacks.items() if t is None or any(t.values())}
    ordered_calls = sorted(called.items(), key=lambda item: -sum((item[1] or {}).values()))
    yield ""
    yield _tally_table("rmap steps", {"all": rmap.steps, **dict(ordered_calls)}, ["file", "ksm"])
    total = rmap.steps["fallback"]
    if total:
        reasons = sorted(((n, reason) for reason, n in rmap.reasons.items() if n), reverse=True)
        rows = [[reason, _number(n), share(n / total)] for n, reason in reasons]
        yield ""
        yield columns(rows, ["rmap fallback because", "steps", "share"], ["left", "right", "right"])


def _calls(counts: Counts, asked: Sequence[str]) -> Iterator[str]:
    """Of copy_vma() and __split_vma()."""
    rows = {SECTIONS[name]: _section(counts, name) for name in asked if name != "rmap"}
    if not rows:
        return
    yield ""
    yield _tally_table("calls", rows, ["noncow", "failed"])
    if counts.copy_vma is not None and any(counts.copy_vma.calls.values()):
        yield f"copy_vma: {_list(counts.copy_vma.reasons)}; results: {_list(counts.copy_vma.results)}"
    if counts.split_vma is not None and counts.split_vma.errors:
        yield f"__split_vma failed: {_list(counts.split_vma.errors)}"


def _assertions(counts: Counts) -> str:
    parts = [
        f"{id_} {NA}"
        if one is None
        else f"{id_} {one.ok:,} ok" + (f" and {one.bad:,} VIOLATED" if one.bad else "")
        for id_, one in counts.assertions.items()
    ]
    return "assertions: " + ", ".join(parts)


def _processes(counts: Counts, asked: Sequence[str], top: int) -> str:
    headers, align = ["pid", "comm"], ["right", "left"]
    for name in asked:
        headers += [f"{name.removesuffix('_vma')} hit", "fallback"]
        align += ["right", "right"]
    rows = [
        [
            NA if one.pid is None else str(one.pid),
            printable(one.comm),
            *(_number(getattr(one, name)[member]) for name in asked for member in ("hit", "fallback")),
        ]
        for one in counts.processes[:top]
    ]
    return columns(rows, headers, align)


def _displacer(one: Displacer) -> str:
    width = terminal_width()
    head = f"PID {one.pid} ({printable(one.comm)}) displaced {plural(one.vmas, 'VMA')}, "
    lines = [head + f"on which rmap fell back {plural(one.rmap_fallbacks, 'time')}"]
    for where, stack in (("user", one.user), ("kernel", one.kernel)):
        frames = " < ".join(printable(frame) for frame in stack) or "unknown"
        lines.append(wrap(f"{where}: {frames}", width - 4, "    "))
    return "\n    ".join(lines)


def violation(one: Violation) -> str:
    """One violation, in a block."""
    frames = " < ".join(printable(frame) for frame in one.stack) or "unknown"
    return "\n".join(
        [
            f"VIOLATION {one.id} in PID {one.pid or NA} ({printable(one.comm)}), seen by thread {one.tid}",
            f"    in the VMA {one.start:x}-{one.end:x} at {one.address:#x}",
            f"    expected {one.expected:#x}, found {one.actual:#x}",
            "    " + wrap(frames, terminal_width() - 4, "    "),
        ]
    )


def summary(counts: Counts, about: str, asked: Sequence[str], top: int) -> str:
    """All of it.

    :param about: a line about the kernel
    :param asked: of :data:`SECTIONS`
    :param top: how many processes and places to name
    """
    width = terminal_width()
    lines = [answer(counts, asked), wrap(f"{about}; {counts.seconds:.1f} s", width, "  "), ""]
    text: list[str] = []
    if counts.rmap is not None:
        text += _rmap(counts.rmap)
    text += _calls(counts, asked)
    if counts.assertions:
        text += ["", _assertions(counts)]
    if counts.processes:
        text += ["", _processes(counts, asked, top)]
    if counts.displacers:
        text += ["", *(_displacer(one) for one in counts.displacers[:top])]
    # Tables have their own width, and more than one line.
    lines += [line if "\n" in line else wrap(line, width, "  ") for line in text]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip()


def screen(
    total: Counts, last: Counts, about: str, asked: Sequence[str], top: int, told: int, height: int
) -> str:
    """What a terminal shows while it goes on.

    :param total: since the beginning
    :param last: since the last screen
    :param told: of the violations, how many of the last to tell
    :param height: lines that there is room for
    """
    head, _, rest = summary(total, about, asked, top).partition("\n\n")
    lines = head.splitlines()
    lines += wrap(f"last {last.seconds:.1f} s: {_rates(last, asked)}", terminal_width(), "  ").splitlines()
    for one in total.violations[-told:]:
        lines += ["", *violation(one).splitlines()]
    lines += ["", *rest.splitlines()]
    return "\n".join(lines[:height])


class Lines:
    """A line for each interval, as vmstat prints them."""

    # Lines between two headers.
    EVERY = 20

    def __init__(self, asked: Sequence[str]) -> None:
        self._asked = asked
        self._printed = 0

    def line(self, clock: str, counts: Counts) -> str:
        """The next line, under a header now and then.

        :param clock: the time of day
        """
        lines = self._headers() if self._printed % self.EVERY == 0 else []
        self._printed += 1
        cells = [f"{clock:8}"]
        for name in self._asked:
            cells += self._cells(counts, name)
        lines.append(" ".join([*cells, f"{_plain(counts.bad if counts.assertions else None):>4}"]))
        return "\n".join(lines)

    def _headers(self) -> list[str]:
        first, second = [" " * 8], [f"{'time':8}"]
        for name in self._asked:
            if name == "rmap":
                words = [f"{'walks':>8}", f"{'hit':>8}", f"{'fallback':>8}", f"{'hit%':>6}"]
            else:
                words = [f"{'hit':>7}", f"{'fallb':>7}", f"{'failed':>6}"]
            second.append(" ".join(words))
            first.append(f" {SECTIONS[name]} ".center(len(second[-1]) - 1, "-").rjust(len(second[-1])))
        return [" ".join(first), " ".join([*second, f"{'bad':>4}"])]

    def _cells(self, counts: Counts, name: str) -> list[str]:
        tally = _section(counts, name)
        hit, fallback = (None, None) if tally is None else (tally["hit"], tally["fallback"])
        if name != "rmap":
            failed = None if tally is None else tally["failed"]
            return [f"{_plain(hit):>7}", f"{_plain(fallback):>7}", f"{_plain(failed):>6}"]
        # Under a filter the empty ones are unknown: they are left out everywhere.
        kinds = {} if counts.rmap is None else counts.rmap.walks
        known = [n for kind, n in kinds.items() if kind != "empty"]
        walks = sum(n or 0 for n in known) if known and None not in known else None
        rate = NA if tally is None else share(hit_rate(tally))
        return [f"{_plain(walks):>8}", f"{_plain(hit):>8}", f"{_plain(fallback):>8}", f"{rate:>6}"]


def _plain(number: int | None) -> str:
    """Without commas: other programs read these lines too."""
    return NA if number is None else str(number)
