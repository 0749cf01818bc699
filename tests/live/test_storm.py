# SPDX-License-Identifier: GPL-2.0-only
"""A healthy machine in which everything changes all the time is accused of nothing: the storm in short.

`make storm` is the long form, which checks from inside too; that takes minutes a round without KVM.
"""

import json
import os
from collections import Counter
from types import SimpleNamespace

import pytest

from kvirt.lab.guest import Guest
from kvirt.lab.kernels import get_kernel
from kvirt.lab.storm import run
from tests.conftest import LEGACY, LIFETIME, MODERN

OUTSIDE, DUMPS = 25, 2


@pytest.fixture(scope="module", params=[MODERN, LEGACY])
def seen(request, tmp_path_factory):
    """What rounds from outside and dumps gave; and what the storm says of itself.

    In a guest of its own: swap, KSM and huge pages are set for the storm.
    """
    if os.geteuid() != 0:
        pytest.skip("Guests need root: run the tests with `make test`, which uses sudo.")
    rounds = SimpleNamespace(outside=[], dumps=[])
    with Guest(get_kernel(request.param), timeout=LIFETIME) as guest:
        with run.storm(guest) as storm:
            rounds.summary = run.watch_from_outside(guest, OUTSIDE, rounds.outside.append)
            for _ in range(DUMPS):
                rounds.dumps.append(run.check_dump(guest, tmp_path_factory.mktemp("storm")))
        rounds.storm = storm.summary
        settings = guest.run(["cat", "/proc/swaps", "/sys/kernel/mm/ksm/run"], check=True).stdout
    rounds.settings = settings.splitlines()
    return rounds


def test_no_round_accuses_a_healthy_machine(seen):
    assert (len(seen.outside), len(seen.dumps)) == (OUTSIDE, DUMPS)
    assert [error for message in (*seen.outside, *seen.dumps) for error in message["errors"]] == []


def test_every_round_judged_the_machine(seen):
    for message in (*seen.outside, *seen.dumps):
        assert message["processes"] > 1
        assert message["pages"]["verified"] > 1000


def test_the_summary_is_the_sum_of_the_rounds(seen):
    assert seen.summary["rounds"] == OUTSIDE
    assert seen.summary["processes"] == sum(message["processes"] for message in seen.outside)
    transient = Counter()
    for message in seen.outside:
        transient.update(message["findings"].get("transient", {}))
    assert seen.summary["findings"].get("transient", {}) == transient


def test_processes_came_went_and_looked_wrong_for_a_moment(seen):
    assert sum(message["gone"] for message in seen.outside) > 0
    assert seen.summary["findings"].get("transient")


def test_the_storm_did_all_that_it_should(seen):
    storm = seen.storm
    assert storm["failures"] == [], json.dumps(storm)
    done = {name for name, (times, _) in storm["operations"].items() if times}
    assert done | set(storm["absent"]) == set(storm["operations"])
    assert {"fork", "exec", "mremap dontunmap", "madvise PAGEOUT", "madvise COLLAPSE", "uffd move"} <= done


def test_the_storm_leaves_the_machine_as_it_was(seen):
    # A header and nothing below it; and KSM as Debian has it.
    assert len(seen.settings) == 2
    assert seen.settings[1] == "0"
