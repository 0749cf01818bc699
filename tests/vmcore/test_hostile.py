# SPDX-License-Identifier: GPL-2.0-only
"""Structures that hold anything at all: the checks come to their end, and look at all other processes."""

import pytest

from tests.vmcore.hostile import Hostile

# More of them take minutes, and were run by hand; these differ in what they damage.
SEEDS = range(7)
# Where a task is damaged, or the way to it, it may not be found.
UNFINDABLE = ("task", "pid_table")


@pytest.fixture(scope="module")
def hostile(dump):
    return Hostile(dump.open(), dump.processes().values())


@pytest.mark.parametrize("seed", SEEDS)
def test_any_damage_comes_to_a_verdict(hostile, seed):
    outcome = hostile.run(seed)
    assert outcome.damaged
    status = outcome.report.exit_status()
    assert status in (0, 1, 3), outcome.damaged
    assert (status == 3) <= bool(outcome.report.incomplete)
    if not any(said.startswith(UNFINDABLE) for said in outcome.damaged):
        assert outcome.pids == hostile.all, outcome.damaged
    assert len(outcome.pids) > len(hostile.all) // 2


def test_damage_is_mended_after_each(hostile):
    for seed in (1, 2):
        hostile.run(seed)
    report = hostile.check()
    assert report.exit_status() == 0
    assert report.incomplete == []
