# SPDX-License-Identifier: GPL-2.0-only
"""The printed tables, to the letter."""

import json
from collections import Counter
from pathlib import Path

import drgn
import jsonschema
import pytest

from kvirt.errors import printable
from kvirt.findings import Finding, PageCounts, Report, Severity, TaskReport, VmaRow
from kvirt.layout import Scheme
from kvirt.mm.vma import Vma, vma_kind
from kvirt.render.json import check_document, schema
from kvirt.render.table import _short_count, check_table, machine_table, vmas_table
from kvirt.target import Kind, Target
from tests.unit.fake import make_layout

GOLDEN = Path(__file__).parent / "golden"
TARGET = Target(drgn.Program(), Kind.CORE, "dwarf", "vmcore")
PRIVATE, GROWSDOWN = 0x73, 0x100
FILE, OPS = 0xFFFF888000009000, 0xFFFFFFFF82000000


def row(layout, start, pages, pgoff, anon_pgoff, *, name="", flags=PRIVATE, file=0, ops=0, faulted=True):
    vma = Vma(
        layout,
        0xFFFF888000000000 + start,
        start,
        start + pages * 4096,
        0,
        flags,
        pgoff,
        anon_pgoff,
        0xFFFF888000005000 if faulted else 0,
        ops,
        file,
        0,
        0,
        0,
    )
    return VmaRow(vma, vma_kind(vma), name)


def rows(layout):
    legacy = layout.scheme is Scheme.LEGACY
    base = 0x7F9AE3487000
    return [
        row(
            layout,
            0x400000,
            16,
            0,
            0 if legacy else 0x400,
            name="/usr/bin/cat",
            file=FILE,
            ops=OPS,
            faulted=False,
        ),
        row(layout, 0x410000, 4, 16, 16 if legacy else 0x410, name="/usr/bin/cat", file=FILE, ops=OPS),
        row(layout, base, 2, base >> 12, base >> 12),
        row(layout, base + 0x10000, 2, 0x7F9AE3487, 0x7F9AE3487),
        row(
            layout,
            base + 0x20000,
            1,
            3,
            3 if legacy else (base >> 12) + 0x20,
            name="/a/path/so/long/that/it/cannot/possibly/fit/into/the/room/that/is/left/lib\x1b[31m.so",
            flags=0xF9,
            file=FILE,
            ops=OPS,
            faulted=False,
        ),
        row(
            layout,
            0x7FFC6F7C1000,
            33,
            0xFFFFFFFFFDE,
            0xFFFFFFFFFDE,
            name="[stack]",
            flags=PRIVATE | GROWSDOWN,
        ),
    ]


def sound(layout):
    listed = rows(layout)
    task = TaskReport(42, "evil\x1b[2J", len(listed), listed, judged=True)
    skipped = Counter({"KSM pages": 30, "zero pages": 4})
    task.pages = PageCounts(1234, 600, 1200, 600, Counter({"KSM pages": 30}), skipped)
    return task


def with_findings(layout):
    task = sound(layout)
    start = 0x7F9AE3497000
    task.findings = [
        Finding("ANONVMA-IN-NONCOW", Severity.WARNING, "the VMA has an anon_vma, though nothing in it can be "
                "copied on write", 42, (0x410000, 0x414000), None, 0, 0xFFFF888000005000),
        Finding("FOLIO-INDEX", Severity.ERROR, "page frame 0x1810e is indexed 0x7f9ae3489, and should be "
                "0x7f9ae3488 (+1)", 42, (start, start + 8192), start + 4096, 0x7F9AE3488, 0x7F9AE3489, 2),
        Finding("VMA-TREE", Severity.ERROR, "mm->map_count is 7, and the tree holds 6 VMAs", 42,
                expected=6, actual=7),
    ]  # fmt: skip
    return task


def incomplete(layout):
    task = sound(layout)
    task.incomplete = ["PID 42 (evil): 3 page tables cannot be read, the first for address 0x1000."]
    return task


def report(*tasks, max_findings=1000):
    out = Report(max_findings)
    for task in tasks:
        out.add(task)
    return out


def printed_check(task, **options):
    return check_table(TARGET, make_layout(), report(task), [task], **options)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("consistent", lambda: printed_check(sound(make_layout()))),
        ("findings", lambda: printed_check(with_findings(make_layout()))),
        ("incomplete", lambda: printed_check(incomplete(make_layout()), vmas=False)),
        ("machine", lambda: printed_machine(1000)),
        ("machine-omitted", lambda: printed_machine(4)),
        (
            "legacy",
            lambda: vmas_table(
                TARGET, make_layout(Scheme.LEGACY), 42, "cat", rows(make_layout(Scheme.LEGACY))
            ),
        ),
    ],
)
def test_golden(name, text, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    printed = text()
    golden = GOLDEN / f"{name}.txt"
    assert printed + "\n" == golden.read_text()
    assert max(len(line) for line in printed.splitlines()) <= 100
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (-5, "-5"), (999_999, "+999999"), (1_000_000, "+1.0M"), (-17_557_827_821_630, "-17.6T")],
)
def test_short_count(number, text):
    assert _short_count(number) == text


def test_strangers_strings_are_escaped():
    assert printable("a\x1b[31m\nb\u202ec é") == "a\\x1b[31m\\nb\\u202ec é"


def test_verdict_and_exit_status():
    layout = make_layout()
    assert report(sound(layout)).exit_status() == 0
    assert report(incomplete(layout)).exit_status() == 3
    assert report(sound(layout), with_findings(layout), incomplete(layout)).exit_status() == 1
    odd = sound(layout)
    odd.findings = [Finding("X", Severity.WARNING, "odd")]
    assert report(odd).exit_status() == 0
    assert report(odd).exit_status(strict=True) == 1
    odd.findings = [Finding("X", Severity.TRANSIENT, "odd"), Finding("X", Severity.INFO, "odd")]
    assert report(odd).exit_status(strict=True) == 0


def test_what_was_not_looked_at_is_not_in_the_document():
    unread = TaskReport(7, "unread", incomplete=["PID 7 (unread): its memory map cannot be read."])
    gone = TaskReport(8, "gone", gone=True)
    result = report(unread, gone)
    document = json.loads("".join(check_document(TARGET, make_layout(), result, [unread, gone])))
    jsonschema.validate(document, schema("kvirt.check/1"))
    assert document["tasks"] == [{"pid": 7, "comm": "unread"}]
    assert (document["totals"]["processes"], document["totals"]["gone"]) == (0, 1)
    assert result.exit_status() == 3


def machine():
    """Three processes: one wrong in many ways, one in one way, one sound."""
    layout = make_layout()
    start = 0x7F9AE3497000
    many = sound(layout)
    # Every page of the first VMA in its own way, and every page of six more in the same way each.
    many.findings = [
        Finding("FOLIO-INDEX", Severity.ERROR, f"page frame {0x1810E + i:#x} is indexed 0x5, and should be "
                f"{0x7F9AE3497 + i:#x}", 42, (start, start + 8192), start + i * 4096, 0x7F9AE3497 + i, 5)
        for i in range(2)
    ] + [
        Finding("FOLIO-INDEX", Severity.ERROR, f"page frame {0x20000 + i:#x} is indexed 0x6, and should be "
                f"{0x7F9AE349A + i:#x}", 42, (start + i * 12288, start + i * 12288 + 8192),
                start + i * 12288, 0x7F9AE349A + i, 6, 2)
        for i in range(1, 7)
    ]  # fmt: skip
    many.findings += [Finding("ANON-VMA-REF", Severity.INFO, "more than enough", 42, None, 0xFF00, 1, 2)] * 5
    one = sound(layout)
    one.pid, one.comm = 43, "other"
    one.findings = [
        Finding("AVC-EMPTY", Severity.WARNING, "odd", 43, (start, start + 8192)),
        Finding("AVC-IN-TREE", Severity.ERROR, "of another, met here", 77, (start, start + 8192)),
        Finding("AVC-IN-TREE", Severity.TRANSIENT, "going", 43, None, 0xFF00),
    ]
    return [many, one, sound(layout), TaskReport(99, "gone", gone=True), incomplete(layout)]


def printed_machine(max_findings):
    result = report(*machine(), max_findings=max_findings)
    return machine_table(TARGET, make_layout(), result)


@pytest.mark.parametrize("max_findings", [0, 1, 5, 12, 1000])
def test_all_findings_count_whatever_is_listed(max_findings):
    result = report(*machine(), max_findings=max_findings)
    assert result.summary() == {
        Severity.ERROR: 9,
        Severity.WARNING: 1,
        Severity.INFO: 5,
        Severity.TRANSIENT: 1,
    }
    assert result.exit_status() == 1
    listed = result.findings()
    assert len(listed) == min(max_findings, 16)
    assert result.omitted().total() + len(listed) == 16
    # The worst are listed, and none of them is left out for a lesser one.
    order = list(Severity)
    ranks = [order.index(f.severity) for f in listed]
    assert ranks == sorted([0] * 9 + [1] + [2] * 5 + [3])[:max_findings]


def test_room_is_made_for_worse_findings():
    result = Report(2)
    for severity in (Severity.TRANSIENT, Severity.INFO, Severity.WARNING, Severity.ERROR, Severity.WARNING):
        result.note(Finding("X", severity, "odd"))
    assert [f.severity for f in result.findings()] == [Severity.ERROR, Severity.WARNING]
    assert result.omitted() == {
        ("X", Severity.WARNING): 1,
        ("X", Severity.INFO): 1,
        ("X", Severity.TRANSIENT): 1,
    }


def test_sentences_are_bounded_too():
    result = Report(2)
    for i in range(5):
        result.note_incomplete(f"sentence {i}")
    assert result.incomplete == ["sentence 0", "sentence 1"]
    assert result.exit_status() == 3
    text = machine_table(TARGET, make_layout(), result)
    assert "and 3 more like these" in text
    assert "anonymous pages: none were seen" in text


@pytest.mark.parametrize(
    ("verified", "unverified", "said"),
    [
        (0, {}, "none were seen"),
        (2000, {}, "all 2,000 verified"),
        (1999, {"KSM pages": 1}, "99.9% of 2,000 verified; not verified: 1 KSM pages"),
        (0, {"KSM pages": 3}, "0.0% of 3 verified; not verified: 3 KSM pages"),
    ],
)
def test_share_of_verified_pages(verified, unverified, said):
    result = Report()
    result.pages.verified = verified
    result.pages.unverified.update(unverified)
    assert f"anonymous pages: {said}\n" in machine_table(TARGET, make_layout(), result)


@pytest.mark.parametrize("tasks", [(), (sound,), (with_findings, incomplete, sound)])
@pytest.mark.parametrize("max_findings", [0, 1000])
def test_documents_keep_their_schema(tasks, max_findings):
    layout = make_layout()
    result = Report(max_findings)

    def added():
        for make in tasks:
            task = make(layout)
            result.add(task)
            yield task

    text = "".join(check_document(TARGET, layout, result, added()))
    document = json.loads(text)
    jsonschema.validate(document, schema("kvirt.check/1"))
    # In pieces or at once: the same.
    assert text == json.dumps(document, indent=1).replace("[]", "[\n ]", not tasks) + "\n"
    assert len(document["tasks"]) == document["totals"]["processes"] == len(tasks)
    wrong = with_findings in tasks
    assert document["summary"]["error"] == 2 * wrong
    assert document["omitted"] == (
        {
            "ANONVMA-IN-NONCOW": {"warning": 1},
            "FOLIO-INDEX": {"error": 1},
            "VMA-TREE": {"error": 1},
        }
        if wrong and not max_findings
        else {}
    )
    for listed in document["tasks"]:
        assert len(listed["vmas"]) == 6
        assert listed["pages"]["unverified"] == {"KSM pages": 30}
    document["findings"] = [{"id": "X"}]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema("kvirt.check/1"))
