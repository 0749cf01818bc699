# SPDX-License-Identifier: GPL-2.0-only
"""What the programs are made of. That they are right, only a kernel can tell: tests/live."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest

from kvirt.errors import KvirtError
from kvirt.trace import counts, program
from kvirt.trace.filters import Cgroup, Glob
from kvirt.trace.program import Indexes, Request
from tests.unit.test_layout_trace import Kernel

MODERN, LEGACY = Kernel().layout(), Kernel(styles=()).layout()
FILTERS = {
    "pid": (Request(pid=1234), {"KV_FILTER_PID": 1234}),
    "comm": (Request(comm=Glob.compile("k*")), {"KV_FILTER_COMM": 1, "KV_GLOB_ACCEPT": 2}),
    "cgroup": (Request(cgroup=Cgroup("/a", 77, 1)), {"KV_FILTER_CGROUP": 77, "KV_FILTER_CGROUP_LEVEL": 1}),
    "family": (Request(family=True), {"KV_FILTER_FAMILY": 1}),
}
NOTHING = Request(rmap=False, copy_vma=False, split_vma=False)
USED = re.compile(r"\bKV_[A-Z0-9_]+\b(?!#)")
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


def needed(text):
    """Constants that must be defined for this text to compile; those that are pasted together too."""
    text = COMMENT.sub("", text)
    lines, kept, skipping = text.splitlines(), [], []
    defined = {line.split()[1] for line in lines if line.startswith("#define KV_")}
    for line in lines:
        words = line.split()
        if words[:1] in (["#ifdef"], ["#ifndef"]):
            skipping.append((words[1] in defined) != (words[0] == "#ifdef"))
        elif words[:1] == ["#if"]:
            value = re.fullmatch(r"#define KV_LEGACY ([01])", next(x for x in lines if "KV_LEGACY" in x))
            assert words == ["#if", "KV_LEGACY"] and value
            skipping.append(value[1] == "0")
        elif words[:1] == ["#else"]:
            skipping[-1] = not skipping[-1]
        elif words[:1] == ["#endif"]:
            skipping.pop()
        elif not any(skipping):
            kept.append(line)
    assert not skipping
    rest = "\n".join(line for line in kept if not line.startswith("#define"))
    macros = "\n".join(line for line in kept if line.startswith("#define") and "##" not in line)
    names = set(USED.findall(rest)) | {n for n in USED.findall(macros) if n not in defined}
    arguments = set(re.findall(r"\bARGUMENT\(ctx, (\w+), (\w+)\)", rest))
    return names | {f"KV_ARG_{function}_{role}" for function, role in arguments}, defined


@pytest.mark.parametrize("layout", [MODERN, LEGACY], ids=["modern", "legacy"])
@pytest.mark.parametrize(
    "request_",
    [
        Request(),
        Request(stacks=True),
        replace(NOTHING, rmap=True),
        replace(NOTHING, copy_vma=True, stacks=True),
        replace(NOTHING, split_vma=True),
        *(request for request, _ in FILTERS.values()),
    ],
    ids=["all", "stacks", "rmap", "copy-vma", "split-vma", *FILTERS],
)
def test_source_needs_nothing_that_is_not_in_it(request_, layout):
    names, defined = needed(program.source(request_, layout))
    assert len(names) > 20
    assert names <= defined


def test_files_are_those_that_are_asked_for():
    everything = program.files(Request(family=True), replace(MODERN, fprobe=True))
    assert everything[0] == "kvirt.h" and len(everything) == len(set(everything))
    assert set(everything) == {path.name for path in program.DIRECTORIES[0].iterdir()}
    assert program.files(NOTHING, MODERN) == ["kvirt.h"]
    assert program.files(replace(NOTHING, copy_vma=True), MODERN) == ["kvirt.h", "copy_vma.c"]
    assert "family.c" not in program.files(Request(pid=1), MODERN)


@pytest.mark.parametrize(
    ("functions", "file"),
    [
        (("copy_vma",), "copy_vma.c"),
        (("__split_vma",), "split_vma.c"),
        (("vma_complete",), "vma_complete.c"),
        (("folio_add_new_anon_rmap", "hugetlb_add_new_anon_rmap"), "new_anon_rmap.c"),
    ],
)
def test_functions_that_cannot_be_probed_leave_their_file_out(functions, file):
    layout = Kernel(without=functions).layout()
    files = program.files(Request(), MODERN)
    assert program.files(Request(), layout) == [name for name in files if name != file]


@pytest.mark.parametrize(("request_", "expected"), FILTERS.values(), ids=FILTERS)
def test_filters(request_, expected):
    defined = program.constants(request_, MODERN)
    assert expected.items() <= defined.items()
    assert defined["KV_FILTER"] == 1 and request_.filtered
    plain = program.constants(Request(), MODERN)
    assert not [name for name in plain if name.startswith("KV_FILTER")] and not Request().filtered
    assert {name for name in defined if name.startswith("KV_FILTER_")} == {
        name for name in expected if name.startswith("KV_FILTER_")
    }


def test_constants_of_the_layout():
    modern, legacy = (program.constants(Request(), layout) for layout in (MODERN, LEGACY))
    assert MODERN.constants.items() <= modern.items()
    assert (modern["KV_LEGACY"], legacy["KV_LEGACY"]) == (0, 1)
    for function, role in (("copy_vma", "anon_pgoff"), ("__split_vma", "addr")):
        name = f"KV_ARG_{function.lstrip('_').upper()}_{role.upper()}"
        assert modern[name] == MODERN.arguments[function][role]
    assert "KV_ARG_COPY_VMA_ANON_PGOFF" not in legacy
    assert 1 << modern["KV_PAGE_SHIFT"] == 4096


@pytest.mark.parametrize("callbacks", [0, 1, 17])
def test_every_name_has_a_counter_of_its_own(callbacks):
    indexes = Indexes(callbacks)
    groups = {
        "walks": counts.WALKS,
        "reasons": counts.RMAP_REASONS,
        "labels": counts.RMAP_LABELS,
        "copy_vma": counts.COPY_VMA,
        "copy_vma_reasons": counts.COPY_VMA_REASONS,
        "copy_vma_results": counts.COPY_VMA_RESULTS,
        "split_vma": counts.SPLIT_VMA,
        "ok": counts.ASSERTIONS,
        "bad": counts.ASSERTIONS,
        "vmas": program.vmas_names(),
        "lost": tuple(program.LOST),
    }
    taken = []
    for member, names in groups.items():
        group = getattr(indexes, member)
        assert tuple(group) == names
        taken += group.values()
    assert len(indexes.steps) == callbacks
    for number, group in enumerate(indexes.steps):
        assert tuple(group) == counts.STEPS
        # As the program works it out.
        first = dict(indexes.constants())["KV_STEP"] + number * len(counts.STEPS)
        assert list(group.values()) == list(range(first, first + len(counts.STEPS)))
        taken += group.values()
    assert len(taken) == len(set(taken))
    assert max(taken) < indexes.size and indexes.size & (indexes.size - 1) == 0


def test_assertions_have_the_same_order_in_both():
    defined = dict(Indexes(3).constants())
    indexes = Indexes(3)
    for name in counts.ASSERTIONS:
        number = defined[f"KV_{name.replace('-', '_')}"]
        assert indexes.ok[name] == defined["KV_OK"] + number
        assert indexes.bad[name] == defined["KV_BAD"] + number


def test_buckets_of_vmas_follow_each_other():
    names = program.vmas_names()
    assert len(names) == program.VMAS_BUCKETS
    edges = [[int(edge) for edge in name.split("-") if edge] for name in names]
    assert edges[:4] == [[1], [2], [3, 4], [5, 8]]
    for before, after in pairwise(edges):
        assert after[0] == before[-1] + 1
    assert names[-1].endswith("-")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-1, "-1"),
        (2**31 - 1, "2147483647"),
        (2**31, "0x80000000ULL"),
        (2**64 - 1, "0xffffffffffffffffULL"),
    ],
)
def test_literal(value, text):
    assert program.literal(value) == text


def test_without_the_programs(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "DIRECTORIES", (tmp_path / "here", tmp_path / "there"))
    with pytest.raises(KvirtError, match=r"neither in .*/here nor in .*/there: install kvirt again"):
        program.text(Request(), MODERN)
