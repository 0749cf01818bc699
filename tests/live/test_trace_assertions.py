# SPDX-License-Identifier: GPL-2.0-only
"""Every assertion is silent on a sound kernel, and told in full when what it looks at is wrong."""

import json

import pytest

from kvirt.trace.counts import ASSERTIONS

from .lies import OFFSET

PAGE = 4096


def traced(guest, *members):
    done = guest.run(["python3", "/kvirt/tests/live/lies.py", *members], timeout=180, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_all_fire(document):
    assert set(document["assertions"]) == set(ASSERTIONS)
    for name, counts in document["assertions"].items():
        assert counts["bad"] > 0, name
    assert {one["id"] for one in document["violations"]} == set(ASSERTIONS)
    assert document["untold"] == 0 and document["lost"] == {}
    for one in document["violations"]:
        assert one["pid"] == document["pid"]
        assert one["start"] <= one["address"] < one["end"]
        assert one["expected"] != one["actual"]
        assert len(one["stack"]) > 3


def assert_none_fires(document):
    assert document["violations"] == [] and document["lost"] == {}
    for name, counts in document["assertions"].items():
        assert counts["ok"] > 0 and counts["bad"] == 0, name


def one_of(document, id_, address):
    """The violation that this process itself caused there."""
    (found,) = (
        v
        for v in document["violations"]
        if v["id"] == id_ and v["address"] == address and v["tid"] == document["pid"]
    )
    return found


@pytest.fixture(scope="module")
def modern(guest73):
    """What came of the truth, of a constant for an offset, and of the file's offset for the anonymous one."""
    return traced(guest73, "truth", "KV_VMA_FLAGS", "KV_VMA_PGOFF")


def test_a_sound_kernel_breaks_none(modern):
    assert_none_fires(modern[0])


def test_each_fires(modern):
    assert_all_fire(modern[1])


def test_a_folio_indexed_by_virtual_offset_in_a_vma_of_file_offsets(modern):
    document = modern[2]
    page, vma = document["at"] + PAGE, {"start": document["at"], "end": document["at"] + 2 * PAGE}
    new = one_of(document, "NEW-INDEX", page)
    assert (new["expected"], new["actual"]) == (OFFSET + 1, page // PAGE)
    assert any("fault" in function for function in new["stack"])
    walk = one_of(document, "RMAP-ADDRESS", page)
    # An offset that is larger than the folio's index makes the VMA's beginning of it, a smaller one this.
    assert (walk["expected"], walk["actual"]) == (vma["start"] + page - OFFSET * PAGE, page)
    assert {name: walk[name] for name in vma} == vma
    assert walk["stack"][0].startswith("try_to_unmap_one+")
    copy = one_of(document, "COPY-AP", document["new"])
    assert (copy["expected"], copy["actual"]) == (document["at"] // PAGE, OFFSET)
    assert document["assertions"]["COPY-AP"] == {"ok": 0, "bad": 1}
    # Both halves' file offsets are as right as their anonymous ones.
    assert document["assertions"]["SPLIT-AP"]["bad"] == 0


def test_on_a_legacy_kernel(legacy_guest):
    truth, lie = traced(legacy_guest, "truth", "KV_VMA_FLAGS")
    assert_none_fires(truth)
    assert_all_fire(lie)
