# SPDX-License-Identifier: GPL-2.0-only
"""The workload in guests: it reaches its states, its predictions are the kernel's, it leaves nothing.

The kernel is read here with drgn alone, so that a mistake of kvirt's own reading cannot hide one of
the workload's.
"""

import contextlib
import json
import signal
import time

import drgn
import pytest
from drgn.helpers.linux.mm import compound_head, follow_page, for_each_vma
from drgn.helpers.linux.pid import find_task

from kvirt.lab.procfs import PAGE_SHIFT
from kvirt.lab.workload.regions import expand

COMMAND = ["python3", "-m", "kvirt.lab.workload"]
# A guest without KVM on a busy host.
PATIENCE = 300
# Of large regions this many pages are compared at each end and in the middle.
SAMPLE = 24

# What a state needs that a legacy kernel may lack; on 7.3 nothing may be skipped.
MAY_LACK = {"main/multi-vma-move", "main/guard", "main/uffd-move"}

PAGE_MAPPING_FLAGS = 3
PAGE_MAPPING_ANON, PAGE_MAPPING_KSM = 1, 3


@pytest.fixture(scope="module", params=["guest73", "legacy_guest"])
def guest(request):
    return request.getfixturevalue(request.param)


@contextlib.contextmanager
def workload(guest, *arguments):
    """Run the workload in the guest; give the process and its document."""
    process = guest.popen([*COMMAND, *arguments])
    try:
        line = process.readline(PATIENCE)
        if not line:
            process.wait(PATIENCE)
            pytest.fail(f"The workload printed nothing: {process.stderr_text()}")
        yield process, json.loads(line)
    finally:
        process.close_stdin()
        with contextlib.suppress(TimeoutError):
            process.wait(PATIENCE)


def pids(document):
    return [process["pid"] for process in document["processes"]]


def left(guest, document):
    """Name the workload's processes that are still there."""
    alive = guest.run(["sh", "-c", "cd /proc; echo [0-9]*"], check=True).stdout.split()
    return [pid for pid in pids(document) if str(pid) in alive]


def send(guest, signal_name, pid):
    # The shell's own: the guest need not have a program of that name.
    guest.run(["sh", "-c", f"kill -{signal_name} {pid}"], check=True)


def is_legacy(document):
    return document["scheme"] == "legacy"


def test_every_state_is_reached(guest):
    done = guest.run([*COMMAND, "--once"], timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    document = json.loads(done.stdout)
    assert document["schema"] == "kvirt.workload/1"
    assert document["kernel"] == guest.kernel.release
    names = [region["name"] for region in document["regions"]]
    assert len(names) == len(set(names)) > 500
    skipped = {entry["name"] for entry in document["skipped"]}
    assert skipped <= (MAY_LACK if is_legacy(document) else set())
    blocked = {name for name in names if name.startswith("main/blocked-merge/")}
    separate = {"main/blocked-merge/low", "main/blocked-merge/high"}
    if is_legacy(document):
        assert blocked in (separate, {"main/blocked-merge/merged"})
    else:
        assert blocked == separate
    assert any(region["faulted"] is False and region["read"] for region in document["regions"])
    huge = [region for region in document["regions"] if region["name"] == "main/thp/region"]
    assert "huge pages mapped by a PMD" in huge[0]["note"]
    assert left(guest, document) == []


def test_for_people(guest):
    done = guest.run([*COMMAND, "--once", "--pretty"], timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "cow-file/region" in done.stdout


def test_it_ends_with_its_stdin(guest):
    with workload(guest) as (process, document):
        assert left(guest, document) == pids(document)
        process.close_stdin()
        assert process.wait(PATIENCE) == 0
        assert left(guest, document) == []


def test_it_ends_on_sigterm(guest):
    with workload(guest) as (process, document):
        send(guest, "TERM", document["pid"])
        assert process.wait(PATIENCE) == 0
        assert left(guest, document) == []


def test_killed_it_leaves_no_children(guest):
    with workload(guest) as (process, document):
        send(guest, "KILL", document["pid"])
        assert process.wait(PATIENCE) == 128 + signal.SIGKILL
        deadline = time.monotonic() + PATIENCE
        while left(guest, document) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left(guest, document) == []


def test_settings_of_the_machine_are_restored(guest):
    files = "/proc/sys/vm/nr_hugepages ksm/run ksm/pages_to_scan transparent_hugepage/*/enabled"
    show = ["sh", "-c", f"cut -c1-12 /proc/swaps; cd /sys/kernel/mm; cat {files}; true"]
    before = guest.run(show, check=True).stdout
    with workload(guest, "--with", "hugetlb,ksm,swap") as (process, document):
        names = {region["name"] for region in document["regions"]}
        assert {"main/hugetlb/moved", "main/ksm/moved-file", "main/swap/moved-file"} <= names
        assert guest.run(show, check=True).stdout != before
        process.close_stdin()
        assert process.wait(PATIENCE) == 0
    assert guest.run(show, check=True).stdout == before


def test_the_kernel_has_what_is_predicted(guest):
    if guest.kernel.vmlinux is None:
        pytest.skip("Without the guest's vmlinux its memory cannot be read from outside.")
    with workload(guest, "--with", "hugetlb,ksm,swap") as (_, document):
        prog = drgn.Program()
        prog.set_qemu_qmp(str(guest.qmp_socket))
        prog.load_debug_info([str(guest.kernel.vmlinux)])
        wrong = []
        compared = 0
        for pid in pids(document):
            mm = find_task(prog, pid).mm
            vmas = {vma.vm_start.value_(): vma for vma in for_each_vma(mm)}
            for region in document["regions"]:
                if region["pid"] == pid:
                    vma = vmas[int(region["start"], 16)]
                    wrong += compare_vma(vma, region, is_legacy(document))
                    if region["prot"]:
                        # Entries of PROT_NONE pages are not present for drgn.
                        pages = sample(expand([*region["written"], *region.get("inherited", [])]))
                        compared += len(pages)
                        wrong += compare_pages(vma, region, pages)
        assert wrong == []
        assert compared > 2000


def sample(pages):
    if len(pages) <= 3 * SAMPLE:
        return pages
    middle = len(pages) // 2
    return pages[:SAMPLE] + pages[middle : middle + SAMPLE] + pages[-SAMPLE:]


def raw_anon_pgoff(vma):
    try:
        low, high = vma.member_("__vm_anon_pgoff_lo"), vma.member_("__vm_anon_pgoff_hi")
    except LookupError:
        return vma.vm_pgoff.value_()
    return high.value_() << 32 | low.value_()


def compare_vma(vma, region, legacy):
    vm_pgoff = region["vm_pgoff"]
    if legacy:
        vm_pgoff = region.get("legacy_vm_pgoff", vm_pgoff)
    expected = {
        "end": int(region["end"], 16),
        "vm_pgoff": None if vm_pgoff is None else int(vm_pgoff, 16),
        "anon_pgoff": None if legacy else int(region["anon_pgoff"], 16),
        "faulted": region["faulted"],
    }
    found = {
        "end": vma.vm_end.value_(),
        "vm_pgoff": vma.vm_pgoff.value_(),
        "anon_pgoff": raw_anon_pgoff(vma),
        "faulted": bool(vma.anon_vma),
    }
    return [
        f"{region['name']}: {key} is {found[key]}, not {value}"
        for key, value in expected.items()
        if value is not None and found[key] != value
    ]


def compare_pages(vma, region, pages):
    start = int(region["start"], 16)
    base = raw_anon_pgoff(vma)
    problems = []
    for address in pages:
        page = follow_page(vma.vm_mm, address)
        head = compound_head(page)
        kind = head.mapping.value_() & PAGE_MAPPING_FLAGS
        if kind == PAGE_MAPPING_KSM:
            # Shared by content: its index says nothing.
            continue
        index = folio_index(head) + (page - head)
        expected = base + (address - start >> PAGE_SHIFT)
        if kind != PAGE_MAPPING_ANON:
            problems.append(f"{region['name']}: the page at {address:#x} is not anonymous")
        elif index != expected:
            problems.append(f"{region['name']}: {address:#x} has index {index:#x}, not {expected:#x}")
    return problems


def folio_index(head):
    try:
        # Renamed, for it is the folio's and not the page's.
        return head.member_("__folio_index").value_()
    except LookupError:
        return head.index.value_()
