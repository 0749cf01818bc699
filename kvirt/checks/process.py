# SPDX-License-Identifier: GPL-2.0-only
"""Runs the checks on one process: once on a dump, and again on what looks wrong while a kernel runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import drgn
import numpy as np

from kvirt.checks.registry import Check, PageBatch, Violation, VmaContext, VmaTable, all_checks
from kvirt.findings import Finding, PageCounts, Severity
from kvirt.layout import Layout
from kvirt.mm.address_space import AddressSpace, mm_unchanged, read_address_space
from kvirt.mm.folio import read_folios
from kvirt.mm.pagetable import (
    U64,
    Leaves,
    WalkTroubles,
    for_each_leaf,
    leaf_pfn,
    leaf_present,
    leaf_special,
    swap_type,
)

# What looks wrong is read this many times more, with this pause before each, in seconds.
REREADS = 2
PAUSE = 0.012
# How often one re-read is tried until nobody changes the process meanwhile.
TRIES = 8

# Reasons for which a page or entry is not judged.
NO_VMA = "pages no VMA covers"
SPECIAL = "special mappings without struct page"
ZERO = "zero pages"
NO_MAPPING = "kernel or driver pages"
KSM = "KSM pages"
HWPOISON = "poisoned pages"
UNREADABLE = "pages whose struct page cannot be read"
TEMPORARY_STACK = "pages of an exec's temporary stack"
HUGETLB_UNITS = "hugetlb pages indexed in huge pages"
NOT_PRESENT = {
    "swap": "swap entries",
    "hwpoison": HWPOISON,
    "migration": "migration entries",
    "device": "device page entries",
    "marker": "marker entries",
}


# Entries of one process that are remembered one by one when they look wrong. Bounds memory when
# everything is wrong.
HITS_MAX = 1 << 16

_Key = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class _PageHit:
    """One leaf entry that a check objects to."""

    check: Check
    vma: int
    """Address of the struct vm_area_struct."""
    range: tuple[int, int]
    address: int
    expected: int
    actual: int
    pfn: int
    head: int
    pages: int

    @property
    def key(self) -> _Key:
        return self.check.id, self.address, 0


@dataclass(slots=True)
class _Pass:
    """What one reading of a process gave."""

    space: AddressSpace
    violations: dict[_Key, tuple[Check, VmaContext | None, Violation]] = field(default_factory=dict)
    """By check, VMA, and which of the check's violations on this VMA it is."""
    hits: dict[_Key, _PageHit] = field(default_factory=dict)
    """By check and address."""
    overflow: int = 0
    """Base pages objected to beyond HITS_MAX."""
    troubles: WalkTroubles = field(default_factory=WalkTroubles)


@dataclass(slots=True)
class ProcessResult:
    """Findings on one process, without its PID."""

    space: AddressSpace
    findings: list[Finding]
    pages: PageCounts
    incomplete: list[str]


class ProcessChecker:
    """Checks processes of one kernel."""

    def __init__(self, prog: drgn.Program, layout: Layout, *, moves: bool) -> None:
        """Prepare.

        :param moves: whether the kernel runs while it is read
        """
        self.prog = prog
        self.layout = layout
        self.moves = moves
        checks = all_checks(layout)
        self._space_checks = [c for c in checks if c.page is None]
        self._page_checks = [c for c in checks if c.page is not None]
        self._huge_zero_pfn: int | None = None

    def check(self, mm: int, progress: Callable[[int], None] = lambda pages: None) -> ProcessResult:
        """Check one process.

        :param mm: address of its ``struct mm_struct``
        :param progress: is told the number of pages seen since the last call
        :raises drgn.FaultError: if the mm_struct or its top page table cannot be read
        """
        space = self._read(mm)
        result = ProcessResult(space, [], PageCounts(), [])
        if space.mm_users == 0:
            result.incomplete.append("the process is exiting, and its VMAs are being taken apart")
            return result
        self._huge_zero_pfn = self._read_huge_zero_pfn()
        first = _Pass(space)
        self._check_space(first)
        self._check_pages(first, None, result.pages, progress)
        self._note_troubles(first, result)
        suspects = set(first.violations) | set(first.hits)
        transient: set[_Key] = set()
        for _ in range(REREADS if self.moves else 0):
            if not suspects:
                break
            again = self._reread(first)
            if again is None:
                result.incomplete.append(
                    "what looked wrong could not be read again: the process is exiting, or changes its "
                    "mappings all the time"
                )
                transient |= suspects
                break
            stays = set(again.violations) | set(again.hits)
            transient |= suspects - stays
            suspects &= stays
            # The freshest values of what repeats; the rest keeps those that it was seen with.
            first.violations.update((k, v) for k, v in again.violations.items() if k in suspects)
            first.hits.update((k, v) for k, v in again.hits.items() if k in suspects)
        unsettled = space.unstable or (not self.moves and bool(space.write_locked))
        result.findings = list(self._space_findings(first, transient, unsettled))
        result.findings += _page_findings(first.hits.values(), transient, unsettled)
        if first.overflow:
            result.incomplete.append(
                f"{first.overflow} more pages look wrong and were not looked at one by one"
            )
        return result

    def _read(self, mm: int) -> AddressSpace:
        """Read the address space; while the kernel runs, preferably with nobody changing it."""
        space = read_address_space(self.prog, self.layout, mm)
        if self.moves:
            for _ in range(TRIES):
                if not space.write_locked and space.broken_tree is None:
                    break
                time.sleep(PAUSE)
                space = read_address_space(self.prog, self.layout, mm)
        return space

    def _read_huge_zero_pfn(self) -> int | None:
        address = self.layout.huge_zero_pfn_address
        if address is None:
            return None
        pfn: int = self.prog.read_u64(address)
        return None if pfn == (1 << 64) - 1 else pfn

    def _check_space(self, into: _Pass) -> None:
        space = into.space
        for check in self._space_checks:
            if check.mm is not None:
                for n, violation in enumerate(check.mm(space)):
                    into.violations[check.id, violation.address or 0, n] = (check, None, violation)
        for entry in space.entries:
            vma = entry.vma
            if vma.vm_mm != space.address:
                # VMA-TREE has its say on it; while a fork copies the tree it is the parent's VMA.
                continue
            context = VmaContext(space, vma, entry.first, entry.last, space.chains[vma.address])
            for check in self._space_checks:
                if check.vma is not None:
                    for n, violation in enumerate(check.vma(context)):
                        into.violations[check.id, vma.address, n] = (check, context, violation)

    def _check_pages(
        self,
        into: _Pass,
        wanted: U64 | None,
        counts: PageCounts,
        progress: Callable[[int], None] = lambda pages: None,
    ) -> dict[int, int]:
        """Check present pages; returns the entries of those objected to, by address."""
        table = VmaTable(into.space)
        seen: dict[int, int] = {}
        for leaves in for_each_leaf(self.prog, self.layout, into.space.pgd, into.troubles, wanted):
            progress(len(leaves) * leaves.pages)
            batch, leaves = self._batch(table, leaves, counts)
            if not len(batch.address):
                continue
            for check in self._page_checks:
                assert check.page is not None
                bad = check.page(batch)
                where = np.flatnonzero(bad.mask)
                room = max(0, HITS_MAX - len(into.hits))
                into.overflow += len(where[room:]) * batch.pages
                for i in where[:room].tolist():
                    vma = table.vmas[int(batch.row[i])]
                    hit = _PageHit(
                        check,
                        vma.address,
                        (vma.vm_start, vma.vm_end),
                        int(batch.address[i]),
                        int(bad.expected[i]),
                        int(bad.actual[i]),
                        int(batch.pfn[i]),
                        int(batch.folios.head[i]),
                        batch.pages,
                    )
                    into.hits[hit.key] = hit
                    seen[hit.address] = int(leaves.entry[i])
        return seen

    def _batch(self, table: VmaTable, leaves: Leaves, counts: PageCounts) -> tuple[PageBatch, Leaves]:
        """Sort out what cannot be judged, count it, and read the folios of the rest."""
        layout, size = self.layout, leaves.pages

        def skip(reason: str, number: int) -> None:
            if number:
                counts.skipped[reason] += int(number) * size

        present = leaf_present(leaves)
        absent = swap_type(leaves.take(~present))
        for type_, number in zip(*np.unique(absent, return_counts=True), strict=True):
            skip(NOT_PRESENT[layout.swap_types.names[int(type_)]], int(number))
        leaves = leaves.take(present)
        counts.present += len(leaves) * size
        pfn = leaf_pfn(layout, leaves)
        row = table.find(leaves.address)
        zero = np.zeros(len(leaves), dtype=bool)
        if layout.zero_pfn is not None and leaves.level == 0:
            zero = (pfn - np.uint64(layout.zero_pfn)) < np.uint64(layout.zero_pages)
        elif self._huge_zero_pfn is not None and leaves.level == 1:
            zero = pfn == np.uint64(self._huge_zero_pfn)
        special = leaf_special(leaves) & ~zero
        no_vma = (row < 0) & ~zero & ~special
        skip(ZERO, zero.sum())
        skip(SPECIAL, special.sum())
        skip(NO_VMA, no_vma.sum())
        keep = ~(zero | special | no_vma)
        leaves, pfn, row = leaves.take(keep), pfn[keep], row[keep]
        folios = read_folios(self.prog, layout, pfn)
        poisoned = (folios.flags & np.uint64(layout.pg_hwpoison)) != 0
        bare = folios.readable & ~poisoned & (folios.mapping == 0)
        skip(UNREADABLE, (~folios.readable).sum())
        skip(HWPOISON, (folios.readable & poisoned).sum())
        skip(NO_MAPPING, bare.sum())
        keep = folios.readable & ~poisoned & ~bare
        anon, ksm = folios.is_anon() & keep, folios.is_ksm() & keep
        building = anon & table.temporary_stack[row] if table.vmas else anon
        skip(KSM, ksm.sum())
        skip(TEMPORARY_STACK, building.sum())
        in_huge_units = np.zeros_like(anon)
        if not layout.hugetlb_index_in_pages and table.vmas:
            in_huge_units = anon & table.hugetlb[row]
            skip(HUGETLB_UNITS, in_huge_units.sum())
        counts.anon += int(anon.sum()) * size
        counts.checked += int((keep & ~ksm & ~building & ~in_huge_units).sum()) * size
        leaves = leaves.take(keep)
        batch = PageBatch(
            layout,
            table,
            leaves.level,
            size,
            leaves.address,
            pfn[keep],
            row[keep],
            folios.take(keep),
        )
        return batch, leaves

    def _reread(self, previous: _Pass) -> _Pass | None:
        """Read again what looked wrong: VMAs, entries and folios together, and nothing changing.

        Returns None if the process is gone or never stands still.
        """
        wanted = np.array(sorted({hit.address for hit in previous.hits.values()}), dtype=np.uint64)
        for _ in range(TRIES):
            time.sleep(PAUSE)
            try:
                again = _Pass(self._read(previous.space.address))
                if again.space.mm_users == 0:
                    return None
                if again.space.write_locked:
                    continue
                self._check_space(again)
                if len(wanted):
                    entries = self._check_pages(again, wanted, PageCounts())
                    if not self._entries_unchanged(again, entries):
                        continue
                if not mm_unchanged(self.prog, again.space):
                    continue
            except drgn.FaultError:
                continue
            return again
        return None

    def _entries_unchanged(self, again: _Pass, entries: dict[int, int]) -> bool:
        """Whether the entries of what looks wrong are still those that were judged."""
        wanted = np.array(sorted(entries), dtype=np.uint64)
        now: dict[int, int] = {}
        for leaves in for_each_leaf(self.prog, self.layout, again.space.pgd, WalkTroubles(), wanted):
            now.update(zip(leaves.address.tolist(), leaves.entry.tolist(), strict=True))
        # The processor sets the accessed and dirty bits by itself.
        ignored = ~(1 << 5 | 1 << 6)
        return all(now.get(a, 0) & ignored == e & ignored for a, e in entries.items())

    def _note_troubles(self, first: _Pass, result: ProcessResult) -> None:
        tables = first.troubles.unreadable
        if tables:
            result.incomplete.append(
                f"{len(tables)} page tables cannot be read, the first for address {tables[0]:#x}"
            )
        unreadable = result.pages.skipped[UNREADABLE]
        if unreadable:
            result.incomplete.append(f"the struct page of {unreadable} mapped pages cannot be read")
        if first.space.unstable:
            result.incomplete.append("the OOM killer has taken memory from the process")

    def _space_findings(self, from_: _Pass, transient: set[_Key], unsettled: bool) -> Iterator[Finding]:
        for key, (check, context, violation) in from_.violations.items():
            severity = violation.severity or check.severity
            if key in transient or unsettled or _anon_vma_locked(context):
                severity = Severity.TRANSIENT
            vma = None if context is None else (context.vma.vm_start, context.vma.vm_end)
            yield Finding(
                check.id,
                severity,
                violation.message,
                vma=vma,
                address=violation.address,
                expected=violation.expected,
                actual=violation.actual,
            )


def _anon_vma_locked(context: VmaContext | None) -> bool:
    """Whether the first fault in the VMA may be under way: __anon_vma_prepare(), mm/rmap.c.

    It holds mmap_lock for read only, sets the pointer and then fills the chain, both with the new
    anon_vma locked.
    """
    if context is None:
        return False
    own = context.anon_vma(context.vma.anon_vma)
    return own is not None and bool(own.write_locked)


def _page_findings(hits: Iterable[_PageHit], transient: set[_Key], unsettled: bool) -> Iterator[Finding]:
    """One finding for all pages of a VMA that are wrong in the same way, at the first of them."""
    groups: dict[tuple[str, int, int, Severity], list[_PageHit]] = {}
    for hit in hits:
        severity = Severity.TRANSIENT if unsettled or hit.key in transient else hit.check.severity
        key = hit.check.id, hit.vma, hit.check.alike(hit.expected, hit.actual), severity
        groups.setdefault(key, []).append(hit)
    for (id_, _, _, severity), group in groups.items():
        first = min(group, key=lambda hit: hit.address)
        yield Finding(
            id_,
            severity,
            first.check.message.format(
                expected=first.expected,
                actual=first.actual,
                delta=first.actual - first.expected,
                pfn=first.pfn,
                head=first.head,
            ),
            vma=first.range,
            address=first.address,
            expected=first.expected,
            actual=first.actual,
            pages=sum(hit.pages for hit in group),
        )
