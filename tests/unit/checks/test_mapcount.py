# SPDX-License-Identifier: GPL-2.0-only
"""Entries of made-up processes, against counting them one by one."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from kvirt.checks import mapcount
from kvirt.checks.mapcount import FolioMapcounts
from kvirt.checks.registry import PageBatch
from kvirt.findings import Severity
from kvirt.mm.folio import Folios
from tests.unit.fake import VMEMMAP, Memory, make_layout

LAYOUT = make_layout()
START = 0x7F0000000000
ANON = 0xFFFF888000000001


class Machine:
    """Small folios, each with what it counts; and processes that map them."""

    def __init__(self, counts, flags=()):
        self.counts = counts
        self.memory = Memory()
        for head, count in counts.items():
            words = [dict(flags).get(head, 0), 0, 0, ANON, 0, 0, (count - 1) & 0xFFFFFFFF, 0]
            self.memory.put_words(VMEMMAP + head * 64, words)
        self.check = FolioMapcounts(self.memory.prog, LAYOUT)

    def process(self, pid, heads, present=None, anon_vmas=(), hugetlb_order=0):
        n = len(heads)
        zeros = np.zeros(n, dtype=np.uint64)
        heads = np.array(heads, dtype=np.uint64)
        count = np.array([self.counts[h] for h in heads.tolist()], dtype=np.int64)
        none, no = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool)
        folios = Folios(
            ~no, zeros, heads, zeros + np.uint64(ANON), zeros, no, no, none + 1, count, none, none
        )
        space = SimpleNamespace(address=pid * 4096, anon_vmas=dict.fromkeys(anon_vmas), layout=LAYOUT)
        table = SimpleNamespace(
            space=space,
            start=np.array([START], dtype=np.uint64),
            end=np.array([START + n * 4096], dtype=np.uint64),
            hugetlb_order=np.array([hugetlb_order], dtype=np.uint64),
        )
        address = START + np.arange(n, dtype=np.uint64) * np.uint64(4096)
        there = ~no if present is None else np.array(present)
        self.check.pid = pid
        self.check.add(
            PageBatch(LAYOUT, table, 0, 1, address, heads, np.zeros(n, dtype=np.intp), folios, there, None)
        )


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    monkeypatch.setattr(mapcount, "for_each_online_cpu", lambda prog: [])


def test_shared_folios_that_add_up():
    machine = Machine({1: 1, 2: 2, 3: 3})
    machine.process(10, [1, 2, 3, 3])
    machine.process(11, [3, 2])
    assert list(machine.check.findings()) == []


def test_hugetlb_pages_of_contiguous_entries_are_mapped_once():
    machine = Machine({4: 2, 8: 1})
    machine.process(10, [4, 4, 4, 4, 8, 8, 8, 8], hugetlb_order=2)
    machine.process(11, [4, 4, 4, 4], hugetlb_order=2)
    assert list(machine.check.findings()) == []


def test_mapping_that_nobody_has():
    machine = Machine({1: 2, 2: 1})
    machine.process(10, [2, 1])
    [finding] = machine.check.findings()
    assert (finding.id, finding.severity) == ("FOLIO-MAPCOUNT", Severity.WARNING)
    assert (finding.pid, finding.address, finding.vma) == (10, START + 4096, (START, START + 8192))
    assert (finding.expected, finding.actual, finding.pages) == (1, 2, 1)


def test_mapping_that_is_not_counted():
    machine = Machine({1: 1, 2: 1})
    machine.process(10, [1])
    machine.process(11, [2, 1])
    [finding] = machine.check.findings()
    assert (finding.pid, finding.address) == (11, START + 4096)
    assert (finding.expected, finding.actual) == (2, 1)


def test_same_fault_throughout_a_vma_is_one_finding():
    machine = Machine(dict.fromkeys(range(1, 9), 3))
    machine.process(10, list(range(1, 9)))
    [finding] = machine.check.findings()
    assert (finding.address, finding.pages) == (START, 8)


def test_folio_that_is_locked_is_being_changed():
    machine = Machine({1: 2}, flags={1: LAYOUT.pg_locked})
    machine.process(10, [1])
    assert [f.severity for f in machine.check.findings()] == [Severity.TRANSIENT]


def test_process_on_a_processor_may_be_changing_it(monkeypatch):
    running = SimpleNamespace(mm=SimpleNamespace(value_=lambda: 11 * 4096))
    monkeypatch.setattr(mapcount, "for_each_online_cpu", lambda prog: [0])
    monkeypatch.setattr(mapcount, "cpu_curr", lambda prog, cpu: running)
    machine = Machine({1: 2, 2: 1})
    machine.process(10, [1])
    machine.process(11, [2], anon_vmas=[ANON - 1])
    assert [f.severity for f in machine.check.findings()] == [Severity.TRANSIENT]


def test_folio_with_a_page_that_migrates_is_left_out():
    machine = Machine({1: 2, 2: 2})
    machine.process(10, [1, 1, 2], present=[True, False, True])
    [finding] = machine.check.findings()
    assert finding.address == START + 2 * 4096


def test_skipped_with_a_reason():
    machine = Machine({1: 2})
    machine.process(10, [1])
    machine.check.skip("one could not be read")
    machine.check.skip("another neither")
    machine.process(11, [1])
    assert list(machine.check.findings()) == []
    assert machine.check.skipped == "one could not be read"


def test_processors_that_cannot_be_looked_at(monkeypatch):
    def lost(prog):
        raise LookupError("no runqueues")

    monkeypatch.setattr(mapcount, "for_each_online_cpu", lost)
    assert "no runqueues" in Machine({1: 1}).check.skipped


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
@pytest.mark.parametrize("seed", range(20))
def test_any_machine(seed, block, monkeypatch):
    monkeypatch.setattr(mapcount, "_BLOCK", block)
    random = np.random.default_rng(seed)
    entries = [random.integers(1, 40, random.integers(1, 60)).tolist() for _ in range(6)]
    found = Counter(head for heads in entries for head in heads)
    # Some count one more or less than there are.
    counts = {head: n + int(random.choice([0, 0, 0, 0, 1, -1])) for head, n in found.items()}
    machine = Machine(counts)
    for pid, heads in enumerate(entries, 1):
        machine.process(pid, heads)
    wrong = {head for head, n in found.items() if counts[head] != n}
    findings = list(machine.check.findings())
    assert sum(f.pages for f in findings) == len(wrong)
    for finding in findings:
        head = entries[finding.pid - 1][(finding.address - START) // 4096]
        assert (finding.expected, finding.actual) == (found[head], counts[head])


@pytest.mark.parametrize("seed", range(20))
def test_page_frames_are_claimed_once(seed, monkeypatch):
    monkeypatch.setattr(mapcount, "_CHUNK", 64)
    random = np.random.default_rng(seed)
    bits, known = mapcount._Bits(), set()
    claimed = 0
    for _ in range(60):
        first = int(random.integers(0, 4000))
        frames = (first + random.integers(0, random.choice([20, 200, 800]), 8)).astype(np.uint64)
        far = frames.max() // 64 - frames.min() // 64 >= mapcount._CHUNKS_AT_ONCE
        free = not far and len(set(frames.tolist())) == 8 and not known & set(frames.tolist())
        assert bits.claim(frames) == free
        if free:
            known |= set(frames.tolist())
            claimed += 1
        everything = np.arange(5000, dtype=np.uint64)
        assert set(np.flatnonzero(bits.test(everything)).tolist()) == known
    assert 0 < claimed < 60


def test_folio_that_another_process_maps_beyond_its_count():
    machine = Machine(dict.fromkeys(range(1, 9), 1))
    machine.process(10, list(range(1, 9)))
    machine.process(11, [8])
    [finding] = machine.check.findings()
    assert (finding.expected, finding.actual, finding.pages) == (2, 1, 1)


def test_memory_is_that_of_what_is_still_to_come(monkeypatch):
    monkeypatch.setattr(mapcount, "_BLOCK", 10)
    machine = Machine(dict.fromkeys(range(1, 2000), 1) | {5000: 2})
    for pid in range(1, 20):
        machine.process(pid, list(range(pid * 100, pid * 100 + 100)))
    machine.process(20, [5000])
    machine.check._consolidate()
    assert machine.check._pending["head"].tolist() == [5000]
