# SPDX-License-Identifier: GPL-2.0-only
"""What `kvirt trace` counts: known in advance, and counted by the kernel's own tracing too."""

import contextlib
import json
import signal
from collections import Counter
from pathlib import Path

import jsonschema
import pytest

from kvirt.render.json import schema
from kvirt.trace import counts as names
from tests.conftest import LEGACY, MODERN
from tests.live.remaps import CROWD_PAGES, PHASES, UNFORESEEN

FORESEEN = [name for name in PHASES if name not in UNFORESEEN]

COUNTING = ["python3", "-m", "tests.live.counting"]
REMAPS = ["python3", "-m", "tests.live.remaps"]
# How many mappings or pages a phase has.
NUMBER = "7"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "counts.md"
INTRODUCTION = f"""\
# What is counted, known in advance

Written by the tests (`scripts/test tests/live/test_trace_counts.py --write-docs`), and compared with what
they see in each run. A program in the guest (tests/live/remaps.py) does in each phase, with {NUMBER} mappings
or {NUMBER} pages, what `kvirt trace` counts, and works out from the calls alone what must come of it. Three
numbers have to be equal: this forecast; kvirt's counts, member by member; and the calls that the kernel's
own tracing saw at the same time (kprobe events with histograms, without BPF).

"hit" and "fallback" are steps of rmap walks, calls of copy_vma(), or calls of \\_\\_split_vma(); behind them
are the reasons. On 7.3 a copied page of a private file mapping is indexed by its address, on 6.12 by its
offset in the file. In a crowd {NUMBER} processes do the same at the same time, on all processors.

| phase | on 7.3 | on 6.12 |
| --- | --- | --- |
"""
# Linux 7.3 looks at pages picked at random, for statistics; and huge pages are made for anybody.
UNASKED = {
    "/sys/module/damon_stat/parameters/enabled": "N",
    "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs": "4000000000",
}
# A guest without KVM on a busy host.
PATIENCE = 300


@contextlib.contextmanager
def quiet(guest):
    """Keep the kernel from doing of its own accord what is counted."""
    before = {path: guest.run(["cat", path]).stdout.strip() for path in UNASKED}
    for path, value in UNASKED.items():
        if before[path]:
            guest.run(["sh", "-c", f"echo {value} >{path}"], check=True)
    yield
    for path, value in before.items():
        if value:
            guest.run(["sh", "-c", f"echo {value} >{path}"], check=True)


def run_phases(guest):
    with quiet(guest):
        done = guest.run([*COUNTING, NUMBER], timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    *lines, last = map(json.loads, done.stdout.splitlines())
    # All of them, and only one of the two names that this function has had.
    assert last["missed"] == 0
    assert last["missing"] in (["rmap_walk_file"], ["__rmap_walk_file"])
    return {line["phase"]: line for line in lines}


# Of the session, and so kept when the guest has ended: docs/counts.md has both.
@pytest.fixture(scope="session")
def phases73(shared_guest):
    return run_phases(shared_guest(MODERN))


@pytest.fixture(scope="session")
def phases_legacy(shared_guest):
    return run_phases(shared_guest(LEGACY))


@pytest.fixture(scope="module", params=["phases73", "phases_legacy"])
def phases(request):
    """What each phase of remaps.py was forecast to be, and how it was counted; by its name."""
    return request.getfixturevalue(request.param)


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
        # Unknown whose those are that came to no VMA.
        number = number or 0
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


@pytest.mark.parametrize("name", FORESEEN)
def test_forecast_is_what_the_kernel_called(phases, name):
    phase = phases[name]
    assert "skipped" not in phase
    assert calls(phase["counts"]) == seen(phase)
    assert seen(phase)


def test_what_is_not_foreseen_is_counted_alike(phases):
    for name in UNFORESEEN:
        phase = phases[name]
        assert phase["counted"]["lost"] == {}
        new_index = phase["counted"]["assertions"].pop("NEW-INDEX")
        assert new_index == {"ok": phase["seen"].get("folio_add_new_anon_rmap", 0), "bad": 0}
        assert calls(phase["counted"]) == seen(phase)
    assert seen(phases["reclaim"])["folio_referenced_one"] >= 2 * CROWD_PAGES
    reasons = phases["reclaim"]["counted"]["rmap"]["reasons"]
    assert reasons["faulted_displaced_exclusive"] >= 2 * CROWD_PAGES


def all_of(members, tally):
    return dict.fromkeys(members, 0) | only(members, tally)


def check_rmap(counted, forecast):
    # Nothing tells whose a walk without steps is.
    assert counted["walks"] == all_of(names.WALKS, forecast.get("walks", {})) | {"empty": None}
    assert counted["steps"] == all_of(names.STEPS, forecast.get("steps", {}))
    assert counted["reasons"] == all_of(names.RMAP_REASONS, forecast.get("reasons", {}))
    assert counted["labels"] == all_of(names.RMAP_LABELS, forecast.get("labels", {}))
    assert counted["vmas"] == forecast.get("vmas", {})
    callbacks = forecast.get("callbacks", {})
    assert set(callbacks) <= set(counted["callbacks"])
    for name, steps in counted["callbacks"].items():
        assert steps == all_of(names.STEPS, callbacks.get(name, {}))


def check_copy_vma(counted, forecast):
    assert counted == {
        **all_of(names.COPY_VMA, forecast),
        "reasons": all_of(names.COPY_VMA_REASONS, forecast.get("reasons", {})),
        "results": all_of(names.COPY_VMA_RESULTS, forecast.get("results", {})),
    }


def check_split_vma(counted, forecast):
    assert counted == {**all_of(names.SPLIT_VMA, forecast), "errors": forecast.get("errors", {})}


def check_split_vma_of_program(counted, forecast):
    """Check all but what an interpreter does to its own mappings, which it splits too."""
    for kind in ("noncow", "failed", "errors"):
        assert counted[kind] == forecast[kind]
    for kind in ("hit", "fallback"):
        assert counted[kind] >= forecast.get(kind, 0)


def check_processes(document):
    """What single processes had adds up to all of it."""
    for what, total in (
        ("rmap", document["rmap"]["steps"]),
        ("copy_vma", document["copy_vma"]),
        ("split_vma", document["split_vma"]),
    ):
        for kind in ("hit", "fallback"):
            assert sum(process[what][kind] for process in document["processes"]) == total[kind]


@pytest.mark.parametrize("name", FORESEEN)
def test_forecast_is_what_is_counted(phases, name):
    phase = phases[name]
    document, forecast = phase["counted"], phase["counts"]
    jsonschema.validate(document, schema("kvirt.trace/1"))
    assert document["lost"] == {}
    check_rmap(document["rmap"], forecast.get("rmap", {}))
    check_copy_vma(document["copy_vma"], forecast.get("copy_vma", {}))
    check_split_vma(document["split_vma"], forecast.get("split_vma", {}))
    check_processes(document)
    held = forecast.get("assertions", {}) | {"NEW-INDEX": phase["seen"].get("folio_add_new_anon_rmap", 0)}
    assert document["assertions"] == {id_: {"ok": held.get(id_, 0), "bad": 0} for id_ in names.ASSERTIONS}
    assert document["violations"] == []


def tally(numbers):
    return ", ".join(f"{number} {name}" for name, number in numbers.items() if isinstance(number, int))


def cell(counts):
    """What a phase comes to, in one line."""
    parts = []
    rmap = counts.get("rmap")
    if rmap:
        parts.append(f"rmap: {sum(rmap['walks'].values())} walks, {tally(rmap['steps'])}")
        if "reasons" in rmap:
            parts[-1] += f" ({', '.join(rmap['reasons'])})"
    for name in ("copy_vma", "split_vma"):
        if name in counts:
            parts.append(f"{name}: {tally(counts[name])}")
            if why := {**counts[name].get("reasons", {}), **counts[name].get("errors", {})}:
                parts[-1] += f" ({', '.join(why)})"
    if new := counts.get("assertions", {}).get("NEW-INDEX"):
        parts.append(f"{new} new folios")
    return "; ".join(parts)


def test_page_about_it(request, phases73, phases_legacy):
    both = (phases73, phases_legacy)
    rows = ([name, *(cell(phases[name]["counts"]) for phases in both)] for name in FORESEEN)
    generated = INTRODUCTION + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    if request.config.getoption("--write-docs"):
        PAGE.write_text(generated)
    assert PAGE.read_text() == generated, "docs/counts.md is not what this run gives: use --write-docs"


@pytest.fixture(scope="module", params=["guest73", "legacy_guest"])
def guest(request):
    return request.getfixturevalue(request.param)


def added(documents):
    """The sum of documents of one kind, member by member."""
    first = documents[0]
    if isinstance(first, dict):
        members = dict.fromkeys(name for document in documents for name in document)
        return {name: added([one[name] for one in documents if name in one]) for name in members}
    # Unknown in one is unknown.
    return None if None in documents else sum(documents)


def test_command_from_start_to_end(guest):
    chosen = ["copy-homecoming", "copy-forked-child", "copy-self-merged", "copy-crowd", "split-shared"]
    chosen += ["split-failed", "rmap-displaced-chain", "rmap-mixed", "rmap-file", "page-out-displaced"]
    command = ["kvirt", "trace", "--format", "json", "--", *REMAPS, NUMBER, *chosen]
    with quiet(guest):
        done = guest.run(command, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    (document,) = (line for line in lines if line.get("schema") == "kvirt.trace/1")
    jsonschema.validate(document, schema("kvirt.trace/1"))
    done = [line for line in lines if "counts" in line]
    assert [line["phase"] for line in done] == chosen
    # What they prepare with is known too.
    forecast = added([line[part] for line in done for part in ("setup", "counts")])
    assert document["lost"] == {}
    check_rmap(document["rmap"], forecast["rmap"])
    check_copy_vma(document["copy_vma"], forecast["copy_vma"])
    check_split_vma_of_program(document["split_vma"], forecast["split_vma"])
    assert all(one["bad"] == 0 for one in document["assertions"].values())


def test_what_fails_for_want_of_memory(guest):
    program = ["python3", "-m", "tests.live.starve"]
    done = guest.run(
        ["kvirt", "trace", "copy-vma", "split-vma", "--format", "json", "--", *program], timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    calls, document = sorted(map(json.loads, done.stdout.splitlines()), key=len)
    assert calls["mprotect"]["failed"] == calls["mremap"]["failed"] == 40
    assert document["copy_vma"]["failed"] == 40
    assert document["split_vma"]["errors"] == {"ENOMEM": 40}
    # Each that was done has split a page off on both sides.
    assert document["split_vma"]["hit"] >= 2 * calls["mprotect"]["done"]
    assert document["lost"] == {}


def test_process_by_its_pid(guest):
    """Only the VMAs of this process count, whoever walks: here its child, which has displaced its copy."""
    remaps = guest.popen([*REMAPS, NUMBER, "rmap-mixed"])
    ready = json.loads(remaps.readline(PATIENCE))
    with quiet(guest):
        trace = guest.popen(["kvirt", "trace", "rmap", "-p", str(ready["parent"]), "1", "--format", "json"])
        documents = [json.loads(trace.readline(PATIENCE))]
        remaps.write(b"\n")
        forecast = json.loads(remaps.readline(PATIENCE))["counts"]["rmap"]
        # The interval in which it was done, and one after that.
        documents += [json.loads(trace.readline(PATIENCE)) for _ in range(2)]
        trace.signal(signal.SIGINT)
        assert trace.wait(PATIENCE) == 0, trace.stderr_text()
    remaps.close_stdin()
    assert remaps.wait(PATIENCE) == 0
    assert all(document["copy_vma"] is document["split_vma"] is None for document in documents)
    callbacks = {name: {"hit": steps["hit"]} for name, steps in forecast["callbacks"].items() if steps["hit"]}
    own = {
        "walks": {"all_hit": forecast["walks"]["mixed"]},
        "steps": {"hit": forecast["steps"]["hit"]},
        "callbacks": callbacks,
        "vmas": {"1": forecast["vmas"]["2"]},
    }
    check_rmap(added([document["rmap"] for document in documents]), own)
