# SPDX-License-Identifier: GPL-2.0-only
"""What `kvirt trace` counts: known in advance, and counted by the kernel's own tracing too."""

import json
from collections import Counter

import pytest

from kvirt.trace import counts as names
from tests.live.remaps import PHASES

COMMAND = ["python3", "-m", "tests.live.counting"]
# How many mappings or pages a phase has.
NUMBER = "7"
# A guest without KVM on a busy host.
PATIENCE = 300


@pytest.fixture(scope="module", params=["guest73", "legacy_guest"])
def guest(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def phases(guest):
    """What each phase of remaps.py was forecast to be, and how it was counted; by its name."""
    done = guest.run([*COMMAND, NUMBER], timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    *lines, last = map(json.loads, done.stdout.splitlines())
    # All of them, and only one of the two names that this function has had.
    assert last["missed"] == 0
    assert last["missing"] in (["rmap_walk_file"], ["__rmap_walk_file"])
    return {line["phase"]: line for line in lines}


def only(members, forecast):
    return {name: number for name, number in forecast.items() if name in members}


def calls(counts):
    """The calls of the kernel's functions that counts stand for."""
    rmap = counts.get("rmap", {})
    assertions = counts.get("assertions", {})
    found = Counter()
    for function, members in (("copy_vma", names.COPY_VMA), ("__split_vma", names.SPLIT_VMA)):
        found[function] = sum(only(members, counts.get(function.strip("_"), {})).values())
    for name, number in rmap.get("walks", {}).items():
        found[f"rmap_walk_{name if name in ('file', 'ksm') else 'anon'}"] += number
    for function, steps in rmap.get("callbacks", {}).items():
        found[function] += sum(steps.values())
    found["folio_add_new_anon_rmap in the carve-out"] = assertions.get("NEW-INDEX", 0)
    return +found


def seen(phase):
    """What was called, by the kernel's own tracing; the names as in :func:`calls`."""
    found = Counter(phase["seen"])
    found["rmap_walk_file"] += found.pop("__rmap_walk_file", 0)
    # Merges go through it too; and the interpreter has pages of its own.
    for function in ("vma_complete", "folio_add_new_anon_rmap"):
        found.pop(function, 0)
    return +found


@pytest.mark.parametrize("name", PHASES)
def test_forecast_is_what_the_kernel_called(phases, name):
    phase = phases[name]
    assert "skipped" not in phase
    assert calls(phase["counts"]) == seen(phase)
    assert seen(phase)


def all_of(members, tally):
    return dict.fromkeys(members, 0) | tally


def check_rmap(counted, forecast):
    assert counted["walks"] == all_of(names.WALKS, forecast.get("walks", {})) | {"empty": None}
    assert counted["steps"] == all_of(names.STEPS, forecast.get("steps", {}))
    assert counted["reasons"] == all_of(names.RMAP_REASONS, forecast.get("reasons", {}))
    assert counted["labels"] == all_of(names.RMAP_LABELS, forecast.get("labels", {}))
    assert counted["vmas"] == forecast.get("vmas", {})
    callbacks = forecast.get("callbacks", {})
    assert set(callbacks) <= set(counted["callbacks"])
    for name, steps in counted["callbacks"].items():
        assert steps == all_of(names.STEPS, callbacks.get(name, {}))


@pytest.mark.parametrize("name", PHASES)
def test_forecast_is_what_is_counted(phases, name):
    phase = phases[name]
    counted, forecast = phase["counted"], phase["counts"]
    assert counted["lost"] == {}
    check_rmap(counted["rmap"], forecast.get("rmap", {}))
    copy_vma, copied = counted["copy_vma"], forecast.get("copy_vma", {})
    assert copy_vma["calls"] == all_of(names.COPY_VMA, only(names.COPY_VMA, copied))
    assert copy_vma["reasons"] == all_of(names.COPY_VMA_REASONS, copied.get("reasons", {}))
    assert copy_vma["results"] == all_of(names.COPY_VMA_RESULTS, copied.get("results", {}))
    split_vma, split = counted["split_vma"], forecast.get("split_vma", {})
    assert split_vma["calls"] == all_of(names.SPLIT_VMA, only(names.SPLIT_VMA, split))
    assert split_vma["errors"] == split.get("errors", {})
    held = forecast.get("assertions", {}) | {"NEW-INDEX": phase["seen"].get("folio_add_new_anon_rmap", 0)}
    assert counted["assertions"] == {name: {"ok": held.get(name, 0), "bad": 0} for name in names.ASSERTIONS}
    assert counted["violations"] == []
