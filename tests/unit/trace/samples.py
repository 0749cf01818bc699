# SPDX-License-Identifier: GPL-2.0-only
"""Counts made up for the tests of what is printed."""

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
)

PROBES = {
    "rmap_walk": "attached",
    "try_to_unmap_one": "attached",
    "copy_vma": "attached",
    "__split_vma": "attached",
}
MISSING = "This kernel has no symbol page_idle_clear_pte_refs_one."
TIMES = Violation(
    "COPY-AP",
    1234,
    1240,
    "evil\x1b[2J",
    0x7F9AE3487000,
    0x7F9AE3497000,
    0x7F9AE3488000,
    0x7F9AE3488,
    0x7F9AE3489,
    ("copy_vma", "copy_vma_and_data", "move_vma", "mremap_to", "__do_sys_mremap", "do_syscall_64"),
)


def steps(hit, fallback, file=0, ksm=0):
    return {"hit": hit, "fallback": fallback, "file": file, "ksm": ksm}


def calls(hit, fallback, noncow=0, failed=0):
    return {"hit": hit, "fallback": fallback, "noncow": noncow, "failed": failed}


def process(pid, comm, rmap, copy, split):
    return ProcessCounts(
        pid, comm, *({"hit": hit, "fallback": fallback} for hit, fallback in (rmap, copy, split))
    )


def sound():
    return Counts(
        10.04,
        PROBES,
        RmapCounts(
            {
                "all_hit": 812_345,
                "mixed": 321,
                "all_fallback": 4_000,
                "empty": 0,
                "file": 100_000,
                "ksm": 77,
            },
            steps(1_812_345, 9_876, 250_000, 154),
            {
                "temp_stack": 0,
                "stack_displaced": 5_000,
                "file_private_legacy": 0,
                "devzero": 76,
                "faulted_displaced_shared": 4_700,
                "faulted_displaced_exclusive": 100,
            },
            {"alias": 17, "shared": 1_234},
            {
                "folio_referenced_one": steps(1_000_000, 9_000, 200_000, 100),
                "try_to_unmap_one": steps(812_345, 876, 50_000, 54),
                "try_to_migrate_one": steps(0, 0),
            },
            {"1": 810_000, "2": 5_000, "3-4": 1_200, "5-8": 466, "513+": 0},
        ),
        CopyVmaCounts(
            calls(60, 40, 5, 1),
            {
                "unfaulted_reindexed": 50,
                "faulted_homecoming": 10,
                "faulted_displaced_shared": 0,
                "faulted_displaced_exclusive": 40,
                "legacy_file": 0,
            },
            {"new": 90, "merged": 10, "self_merged": 5},
        ),
        SplitVmaCounts(calls(300, 5, 2, 3), {"ENOMEM": 3}),
        {
            "COPY-AP": AssertionCounts(100, 0),
            "SPLIT-AP": AssertionCounts(305, 0),
            "RMAP-ADDRESS": AssertionCounts(1_822_221, 0),
            "NEW-INDEX": AssertionCounts(45_678, 0),
        },
        {},
        (
            process(1234, "evil\x1b[2J", (800_000, 4_800), (0, 40), (0, 5)),
            process(4_194_303, "a-name-of-15-ch", (12_345, 5_076), (10, 0), (300, 0)),
            process(1, "systemd", (1, 0), (50, 0), (0, 0)),
        ),
    )


def troubled():
    """Violations, losses, and what could not be probed or told."""
    all_right = sound()
    assert all_right.rmap is not None
    return replace(
        all_right,
        probes={
            **PROBES,
            "__split_vma": "absent: Its symbol is not in /proc/kallsyms.",
            "page_idle_clear_pte_refs_one": f"absent: {MISSING}",
        },
        rmap=replace(
            all_right.rmap,
            walks={**all_right.rmap.walks, "empty": None},
            callbacks={**all_right.rmap.callbacks, "page_idle_clear_pte_refs_one": None},
        ),
        split_vma=None,
        assertions={
            **all_right.assertions,
            "COPY-AP": AssertionCounts(98, 2),
            "SPLIT-AP": None,
        },
        lost={"the ring of violations was full": 1, "walks too deep": 12},
        displacers=(
            Displacer(
                1234,
                "evil\x1b[2J",
                40,
                4_700,
                ("mremap", "Arena::grow(unsigned long)", "main", "__libc_start_main"),
                ("copy_vma", "copy_vma_and_data", "move_vma", "mremap_to", "__do_sys_mremap"),
            ),
            Displacer(7, "foo", 1, 1, (), ("copy_vma",)),
        ),
        violations=(TIMES, replace(TIMES, tid=1234)),
        violations_untold=1,
    )


def empty():
    """Nothing happened, and only splits were asked for."""
    return Counts(
        1.0,
        {"__split_vma": "attached"},
        split_vma=SplitVmaCounts(calls(0, 0), {}),
        assertions={"SPLIT-AP": AssertionCounts(0, 0)},
    )
