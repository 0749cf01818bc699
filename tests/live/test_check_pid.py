# SPDX-License-Identifier: GPL-2.0-only
"""``kvirt check-pid`` inside a running guest, from outside of it, and on its dump: the same verdict.

What is true comes from the guest's own /proc.
"""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from kvirt.lab.procfs import parse_maps
from kvirt.render.json import schema

TREE = Path(__file__).resolve().parents[2]
# A guest without KVM on a busy host.
PATIENCE = 400
# Of checking what comes and goes from inside, ten seconds each; the storm has many more from outside.
ROUNDS = 4


@pytest.fixture(scope="module", params=["guest73", "legacy_guest"])
def guest(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def pids(guest):
    return [str(process["pid"]) for process in guest.workload["processes"]]


@pytest.fixture(scope="module")
def quiet(guest):
    """Keep the kernel from collapsing pages between two readings."""
    path = "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs"
    before = guest.run(["cat", path], check=True).stdout.strip()
    guest.run(["sh", "-c", f"echo 4000000000 >{path}"], check=True)
    yield
    guest.run(["sh", "-c", f"echo {before} >{path}"], check=True)


@pytest.fixture(scope="module")
def live(guest, pids, quiet):
    """The document that kvirt prints inside the guest."""
    done = guest.run(["kvirt", "check-pid", *pids, "--format", "json"], timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout)
    jsonschema.validate(document, schema("kvirt.check/1"))
    return document


def from_host(*arguments):
    argv = [sys.executable, "-m", "kvirt", *(str(a) for a in arguments)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=TREE, check=False)


def test_live_from_outside_and_dump_agree_by_all_types(guest, pids, live, tmp_path):
    check = ["check-pid", *pids, "--format", "json"]
    core = tmp_path / "vmcore"
    guest.dump(core)
    dwarf, btf = ["-s", guest.kernel.vmlinux], ["--types", "btf"]
    try:
        done = [
            guest.run(["kvirt", *btf, *check], timeout=PATIENCE),
            *(from_host(*types, "--qemu", guest.qmp_socket, *check) for types in (dwarf, btf)),
            from_host(*dwarf, "--qemu", guest.qmp_socket, "--pause", *check),
            *(from_host(*types, "--core", core, *check) for types in (dwarf, btf)),
        ]
    finally:
        core.unlink()
    assert [one.returncode for one in done] == [0] * len(done), [one.stderr for one in done]
    others = [json.loads(one.stdout) for one in done]
    # On what stands still the kernel's log is looked at too.
    logs = [document.pop("log", None) for document in others]
    assert logs == [None] * 3 + [{"complaints": [], "omitted": 0}] * 3
    targets = [document.pop("target") for document in others]
    assert [(target["kind"], target["types"]) for target in (live["target"], *targets)] == [
        ("live", "dwarf"),
        ("live", "btf"),
        ("qemu", "dwarf"),
        ("qemu", "btf"),
        ("qemu", "dwarf"),
        ("core", "dwarf"),
        ("core", "btf"),
    ]
    first = {key: value for key, value in live.items() if key != "target"}
    assert [task["pid"] for task in first["tasks"]] == [int(pid) for pid in pids]
    for other in others:
        assert other == first


def test_vmas_are_those_of_proc_maps(guest, live):
    compared = 0
    for task in live["tasks"]:
        text = guest.run(["cat", f"/proc/{task['pid']}/maps"], check=True).stdout
        maps = [mapping for mapping in parse_maps(text) if mapping.path != "[vsyscall]"]
        assert len(maps) == len(task["vmas"])
        for mapping, vma in zip(maps, task["vmas"], strict=True):
            assert (hex(mapping.start), hex(mapping.end)) == (vma["start"], vma["end"])
            assert mapping.perms == vma["flags"]
            # Without a file maps shows no offset, though there is one.
            if mapping.inode:
                assert mapping.offset >> 12 == int(vma["vm_pgoff"], 16)
            assert mapping.path.removesuffix(" (deleted)") == vma["name"].removesuffix(" (deleted)")
            compared += 1
    assert compared > 1000


def test_names_of_files_of_all_kinds(guest):
    process = guest.popen(["python3", "/kvirt/tests/live/mapped.py"])
    line = process.readline(PATIENCE)
    assert line, process.stderr_text()
    made = json.loads(line)
    pid = str(made["pid"])
    text = guest.run(["cat", f"/proc/{pid}/maps"], check=True).stdout
    maps = [(hex(m.start), m.path) for m in parse_maps(text) if m.path != "[vsyscall]"]
    truth = dict(maps)
    said = {kind: truth[address] for kind, address in made["mapped"].items()}
    # What is to be named at all; how, only the kernel says.
    assert said["perf"] == "anon_inode:[perf_event]"
    assert said["io_uring"] == "anon_inode:[io_uring]"
    assert said["packet"].startswith("socket:[")
    assert said["memfd"] == "/memfd:a name (deleted)"
    assert "" not in said.values()
    check = ["check-pid", pid, "--format", "json"]
    dwarf, btf = ["-s", guest.kernel.vmlinux], ["--types", "btf"]
    seen = [
        guest.run(["kvirt", *check], timeout=PATIENCE),
        guest.run(["kvirt", *btf, *check], timeout=PATIENCE),
        *(from_host(*types, "--qemu", guest.qmp_socket, *check) for types in (dwarf, btf)),
    ]
    process.write(b"\n")
    assert process.wait(PATIENCE) == 0, process.stderr_text()
    for one in seen:
        assert one.returncode == 0, one.stdout[-2000:] + one.stderr
        (task,) = json.loads(one.stdout)["tasks"]
        assert [(vma["start"], vma["name"]) for vma in task["vmas"]] == maps


def test_pages_are_those_of_pagemap(guest, pids, live):
    done = guest.run(["python3", "/kvirt/tests/live/pagemap.py", *pids], timeout=PATIENCE, check=True)
    truth = json.loads(done.stdout)
    for task in live["tasks"]:
        pages = task["pages"]
        expected = truth[str(task["pid"])]
        # pagemap leaves out VM_PFNMAP mappings, whose pages have no struct page, and does not call the zero
        # page a file's.
        special = pages["skipped"].get("special mappings without struct page", 0)
        zero = pages["skipped"].get("zero pages", 0)
        assert pages["present"] - special == expected["present"]
        # Merged pages are anonymous too, and may become so between the two readings.
        anonymous = pages["verified"] + sum(pages["unverified"].values())
        assert anonymous + zero == expected["anon"]


def test_processes_that_come_and_go(guest):
    done = guest.run(["python3", "/kvirt/tests/live/churn.py", str(ROUNDS)], timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["checks"] == 2 * ROUNDS
    assert "Traceback" not in done.stderr
    assert [finding for finding in seen["findings"] if finding[1] == "error"] == []
    assert seen["steady"] == [[0, 0, True]] * ROUNDS


def test_table_and_who_may_not_read(guest):
    done = guest.run(["kvirt", "vmas", "1"], timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "[stack]" in done.stdout
    assert ", live, " in done.stdout.splitlines()[1]
    drop = "import os, sys; os.setgid(65534); os.setuid(65534); os.execvp('python3', sys.argv[1:])"
    nobody = guest.run(["python3", "-c", drop, "python3", "-m", "kvirt", "check-pid", "1"], timeout=PATIENCE)
    assert nobody.returncode == 2
    assert nobody.stderr == "kvirt: Reading the running kernel needs root: run kvirt again with sudo.\n"
