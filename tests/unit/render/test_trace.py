# SPDX-License-Identifier: GPL-2.0-only
"""What `kvirt trace` prints, to the letter."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from kvirt.render import trace
from kvirt.render.json import schema
from kvirt.render.trace_json import trace_document
from kvirt.trace.counts import since
from tests.unit.trace.samples import MISSING, empty, process, sound, steps, troubled

GOLDEN = Path(__file__).parent / "golden"
ABOUT = "Linux 7.3.4; anonymous folios are indexed by the VMA's anon pgoff"
ALL = ("rmap", "copy_vma", "split_vma")
VALIDATOR = jsonschema.Draft202012Validator(schema("kvirt.trace/1"))


def lines():
    table = trace.Lines(ALL)
    many = [table.line(f"14:03:{second:02}", sound()) for second in range(20)]
    return "\n".join([many[0], many[1], table.line("14:03:20", troubled())])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trace", lambda: trace.summary(sound(), ABOUT, ALL, 10)),
        ("trace-troubled", lambda: trace.summary(troubled(), ABOUT, ALL, 10)),
        ("trace-empty", lambda: trace.summary(empty(), ABOUT, ["split_vma"], 10)),
        ("trace-screen", lambda: trace.screen(troubled(), sound(), ABOUT, ALL, 2, 1, 24)),
        ("trace-lines", lines),
        ("trace-lines-split", lambda: trace.Lines(["split_vma"]).line("14:03:01", empty())),
        ("trace-violation", lambda: trace.violation(troubled().violations[0])),
    ],
)
def test_golden(name, text, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    printed = text()
    assert printed + "\n" == (GOLDEN / f"{name}.txt").read_text()
    assert max(len(line) for line in printed.splitlines()) <= 100
    assert "\x1b" not in printed


def test_narrow_terminals(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = trace.summary(troubled(), ABOUT, ALL, 10)
    assert max(len(line) for line in text.splitlines()) <= 80


def test_screen_is_no_higher_than_the_terminal():
    assert len(trace.screen(sound(), sound(), ABOUT, ALL, 10, 1, 7).splitlines()) == 7


def test_not_all_named():
    text = trace.summary(troubled(), ABOUT, ALL, 1)
    assert "systemd" not in text
    assert "PID 7 (foo)" not in text
    document = json.loads(trace_document(troubled(), top=1, stacks=True))
    assert [one["pid"] for one in document["processes"] + document["displacers"]] == [1234, 1234]


@pytest.mark.parametrize(
    ("rate", "text"), [(None, "-"), (0.0, "0.0%"), (0.5, "50.0%"), (0.9999, "99.9%"), (1.0, "100.0%")]
)
def test_shares_are_not_rounded_up_to_all(rate, text):
    assert trace.share(rate) == text


def test_doubts():
    assert trace.doubts(sound()) == []
    assert trace.doubts(troubled()) == [
        "Not counted: 1 event (the ring of violations was full).",
        "Not counted: 12 events (walks too deep).",
        "Of 1 violation nothing more is known: they came too fast.",
    ]
    assert trace.absent(sound()) == {}
    assert trace.absent(troubled()) == {
        "__split_vma": "Its symbol is not in /proc/kallsyms.",
        "page_idle_clear_pte_refs_one": MISSING,
    }


def test_verdicts():
    assert trace.answer(sound(), ALL).startswith(
        "CONSISTENT: no violation in 1,868,304 assertions; rmap 99.5% "
    )
    lossy = replace(sound(), lost={"walks too deep": 1})
    assert trace.answer(lossy, ALL).startswith("INCOMPLETE: ")
    assert trace.answer(replace(troubled(), assertions={}), ALL).startswith("INCOMPLETE: ")
    # Before anything else, that something is wrong.
    assert trace.answer(troubled(), ALL).startswith("INCONSISTENT: 2 violations ")


@pytest.mark.parametrize("make", [sound, troubled, empty])
@pytest.mark.parametrize("stacks", [False, True])
def test_documents(make, stacks):
    text = trace_document(make(), top=10, stacks=stacks)
    assert "\n" not in text
    document = json.loads(text)
    VALIDATOR.validate(document)
    assert ("displacers" in document) is stacks
    between = json.loads(trace_document(since(make(), make()), top=10, stacks=stacks))
    VALIDATOR.validate(between)


def test_what_a_document_says():
    document = json.loads(trace_document(troubled(), top=10, stacks=True))
    assert document["seconds"] == 10.04
    assert document["probes"]["__split_vma"] == "absent: Its symbol is not in /proc/kallsyms."
    assert document["split_vma"] is None
    assert document["rmap"]["walks"]["empty"] is None
    assert document["rmap"]["walks"]["mixed"] == 321
    assert document["rmap"]["callbacks"]["page_idle_clear_pte_refs_one"] is None
    assert document["rmap"]["callbacks"]["try_to_migrate_one"] == steps(0, 0)
    assert document["copy_vma"]["hit"] == 60
    assert document["copy_vma"]["results"] == {"new": 90, "merged": 10, "self_merged": 5}
    assert document["assertions"]["COPY-AP"] == {"ok": 98, "bad": 2}
    assert document["assertions"]["SPLIT-AP"] is None
    assert document["lost"] == {"the ring of violations was full": 1, "walks too deep": 12}
    assert document["processes"][2] == {
        "pid": 1,
        "comm": "systemd",
        "rmap": {"hit": 1, "fallback": 0},
        "copy_vma": {"hit": 50, "fallback": 0},
        "split_vma": {"hit": 0, "fallback": 0},
    }
    assert document["displacers"][1]["user"] == []
    violation = document["violations"][0]
    assert violation["vma"] == {"start": "0x7f9ae3487000", "end": "0x7f9ae3497000"}
    assert (violation["expected"], violation["actual"]) == ("0x7f9ae3488", "0x7f9ae3489")
    assert violation["stack"][0] == "copy_vma"
    assert document["violations_untold"] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("lost"),
        lambda d: d.update(surprise=1),
        lambda d: d["rmap"]["steps"].pop("ksm"),
        lambda d: d["rmap"]["reasons"].update(devzero=None),
        lambda d: d["violations"][0].update(address=4096),
        lambda d: d["probes"].update(copy_vma="absent"),
    ],
)
def test_the_schema_is_strict(change):
    document = json.loads(trace_document(troubled(), top=10, stacks=True))
    change(document)
    assert not VALIDATOR.is_valid(document)


def test_a_process_without_a_section():
    """The columns are those that were asked for."""
    counts = replace(empty(), processes=(process(7, "foo", (0, 0), (0, 0), (1, 2)),))
    last = trace.summary(counts, ABOUT, ["split_vma"], 10).splitlines()[-3:]
    assert last[0].split() == ["pid", "comm", "split", "hit", "fallback"]
    assert last[2].split() == ["7", "foo", "1", "2"]
