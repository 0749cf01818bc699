# SPDX-License-Identifier: GPL-2.0-only
"""What `kvirt trace` counts: known in advance, and counted by the kernel's own tracing too."""

import json
from collections import Counter

import pytest

from tests.live.remaps import PHASES

COMMAND = ["python3", "/kvirt/tests/live/counting.py"]
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


def calls(counts):
    """The calls of the kernel's functions that counts stand for."""
    rmap = counts.get("rmap", {})
    assertions = counts.get("assertions", {})
    found = Counter()
    for function, names in (
        ("copy_vma", ("hit", "fallback", "noncow", "failed")),
        ("__split_vma", ("hit", "fallback", "noncow", "failed")),
    ):
        found[function] = sum(counts.get(function.strip("_"), {}).get(name, 0) for name in names)
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
