# SPDX-License-Identifier: GPL-2.0-only
"""``kvirt check-all`` inside a running guest and from outside of it: what is true comes from /proc."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from kvirt.render.json import schema

TREE = Path(__file__).resolve().parents[2]
# A guest without KVM on a busy host.
PATIENCE = 400


@pytest.fixture(scope="module", params=["guest73", "legacy_guest"])
def guest(request):
    return request.getfixturevalue(request.param)


def processes(guest):
    """PIDs of those that have mappings, and so an address space."""
    listed = guest.run(["sh", "-c", "grep -l . /proc/[0-9]*/maps"]).stdout
    return {int(pid) for pid in re.findall(r"^/proc/(\d+)/maps$", listed, re.M)}


def judged(document, before, after):
    """Everybody who was there all the time is in it, and nobody is accused."""
    jsonschema.validate(document, schema("kvirt.check/1"))
    pids = {task["pid"] for task in document["tasks"]}
    assert before & after <= pids
    assert document["summary"]["error"] == 0
    assert document["incomplete"] == []
    totals = document["totals"]
    assert totals["processes"] == len(pids)
    assert totals["pages"]["verified"] == sum(task["pages"]["verified"] for task in document["tasks"])
    assert totals["pages"]["verified"] > 50_000
    assert totals["misindexed"] == 0


def test_live(guest):
    before = processes(guest)
    assert {process["pid"] for process in guest.workload["processes"]} <= before
    done = guest.run(["kvirt", "check-all", "--format", "json"], timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stderr == ""
    judged(json.loads(done.stdout), before, processes(guest))


def test_from_outside(guest):
    before = processes(guest)
    argv = [
        sys.executable,
        "-m",
        "kvirt",
        "-s",
        guest.kernel.vmlinux,
        "--qemu",
        guest.qmp_socket,
        "check-all",
    ]
    argv = [str(word) for word in argv]
    done = subprocess.run([*argv, "--format", "json"], capture_output=True, text=True, cwd=TREE, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    judged(json.loads(done.stdout), before, processes(guest))
    table = subprocess.run(argv, capture_output=True, text=True, cwd=TREE, check=False)
    assert table.stdout.startswith("CONSISTENT: no errors")
    assert max(len(line) for line in table.stdout.splitlines()) <= 100
