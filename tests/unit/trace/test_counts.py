# SPDX-License-Identifier: GPL-2.0-only
"""Counts of an interval, from those of its two ends."""

from dataclasses import replace

from kvirt.trace.counts import (
    AssertionCounts,
    CopyVmaCounts,
    Counts,
    Displacer,
    ProcessCounts,
    RmapCounts,
    SplitVmaCounts,
    Violation,
    since,
)

TIMES = Violation("COPY-AP", 7, 8, "foo", 0x1000, 0x2000, 0x1000, 1, 2, ("copy_vma",))


def counts(seconds, factor, **more):
    """Where there is a number, it is the factor or a multiple of it."""
    steps = {"hit": 3 * factor, "fallback": factor, "file": 0, "ksm": 0}
    calls = {"hit": 2 * factor, "fallback": factor, "noncow": 0, "failed": factor}
    return Counts(
        seconds,
        {"copy_vma": "attached"},
        RmapCounts(
            {"all_hit": factor, "empty": None},
            steps,
            {"devzero": factor},
            {"alias": factor},
            {"try_to_unmap_one": steps, "page_mkclean_one": None},
            {"1": factor, "2": 5},
        ),
        CopyVmaCounts(calls, {"faulted_homecoming": factor}, {"new": factor}),
        SplitVmaCounts(calls, {"ENOMEM": factor, "EINVAL": 5}),
        {"COPY-AP": AssertionCounts(10 * factor, factor), "NEW-INDEX": None},
        {"ring full": 5},
        **more,
    )


def test_what_was_counted_between():
    assert since(counts(1.5, 10), counts(4.0, 30)) == Counts(
        2.5,
        {"copy_vma": "attached"},
        RmapCounts(
            {"all_hit": 20, "empty": None},
            {"hit": 60, "fallback": 20, "file": 0, "ksm": 0},
            {"devzero": 20},
            {"alias": 20},
            {
                "try_to_unmap_one": {"hit": 60, "fallback": 20, "file": 0, "ksm": 0},
                "page_mkclean_one": None,
            },
            {"1": 20},
        ),
        CopyVmaCounts(
            {"hit": 40, "fallback": 20, "noncow": 0, "failed": 20}, {"faulted_homecoming": 20}, {"new": 20}
        ),
        SplitVmaCounts({"hit": 40, "fallback": 20, "noncow": 0, "failed": 20}, {"ENOMEM": 20}),
        {"COPY-AP": AssertionCounts(200, 20), "NEW-INDEX": None},
        {},
    )


def test_what_was_not_asked_for():
    nothing = Counts(1.0, {})
    assert since(nothing, replace(nothing, seconds=3.0)) == replace(nothing, seconds=2.0)


def process(pid, fallbacks, hits=0, comm="foo"):
    nothing = {"hit": 0, "fallback": 0}
    return ProcessCounts(pid, comm, {"hit": hits, "fallback": fallbacks}, nothing, nothing)


def test_processes_are_ranked_anew():
    earlier = counts(1, 1, processes=(process(3, 100), process(2, 10, 5), process(4, 4)))
    later = counts(2, 1, processes=(process(3, 101), process(2, 40, 5), process(5, 9), process(4, 4)))
    assert since(earlier, later).processes == (process(2, 30), process(5, 9), process(3, 1))
    # What a process counted before exec is not counted again under its new name.
    later = replace(later, processes=(process(3, 102, comm="bar"),))
    assert since(earlier, later).processes == (process(3, 2, comm="bar"),)


def test_places_are_ranked_anew():
    def place(function, vmas, fallbacks):
        return Displacer(7, "foo", vmas, fallbacks, (function,), ("move_vma",))

    earlier = counts(1, 1, displacers=(place("f", 5, 50), place("g", 1, 7)))
    later = counts(2, 1, displacers=(place("f", 5, 51), place("h", 2, 9), place("g", 1, 7)))
    assert since(earlier, later).displacers == (place("h", 2, 9), place("f", 0, 1))


def test_violations_are_told_once():
    earlier = counts(1, 1, violations=(TIMES,), violations_untold=1)
    later = counts(2, 1, violations=(TIMES, TIMES, replace(TIMES, pid=9)), violations_untold=3)
    new = since(earlier, later)
    assert new.violations == (TIMES, replace(TIMES, pid=9))
    assert new.violations_untold == 2
