# SPDX-License-Identifier: GPL-2.0-only
"""Runs the checks on one process: once on a dump, and again on what looks wrong while a kernel runs."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import drgn
import numpy as np

from kvirt.checks import patience
from kvirt.checks.forest import FamilyViolation, Forest
from kvirt.checks.registry import (
    MANY,
    Check,
    PageBatch,
    PageViolations,
    Violation,
    VmaContext,
    VmaRun,
    VmaTable,
    all_checks,
)
from kvirt.checks.sorting import DOUBTS, SWAPPED, Sorted, Sorter
from kvirt.checks.uniform import Uniform
from kvirt.filtered import is_filtered
from kvirt.findings import Finding, PageCounts, Severity
from kvirt.layout import Layout
from kvirt.memory import core_of
from kvirt.mm.address_space import AddressSpace, mm_unchanged, read_address_space
from kvirt.mm.folio import Folios
from kvirt.mm.i_mmap import FileTrees
from kvirt.mm.kernel import snapshot_of
from kvirt.mm.pagetable import IN_CACHE, U64, Leaves, WalkTroubles, for_each_leaf, join
from kvirt.mm.vma import Vma
from kvirt.snapshot import Table
from kvirt.tasks import for_each_process

# Entries of one process that are remembered one by one when they look wrong. Bounds memory when
# everything is wrong.
HITS_MAX = 1 << 16
# Entries of VMAs with few that are judged together.
_LEFT_MAX = 1 << 14

# VMAs that each check looks at in one go.
_VMAS_AT_ONCE = 1 << 12

_Key = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class _PageHit:
    """One leaf entry that a check objects to."""

    check: Check
    severity: Severity
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
    pages: PageCounts = field(default_factory=PageCounts)
    violations: dict[_Key, tuple[Check, VmaContext | None, Violation]] = field(default_factory=dict)
    """By check, address, and which of the check's violations there it is."""
    hits: dict[_Key, _PageHit] = field(default_factory=dict)
    """By check and address."""
    doubts: dict[_Key, int] = field(default_factory=dict)
    """By reason and address: base pages."""
    told: set[tuple[str, int]] = field(default_factory=set)
    """Checks that have a hit, and the VMAs in which they do."""
    overflow: int = 0
    """Base pages objected to that are not in *hits*."""
    troubles: WalkTroubles = field(default_factory=WalkTroubles)
    filtered: int = 0
    """Checks of VMAs that were given up, since something was left out of the dump."""
    unreadable: str | None = None
    """Why the page tables could not be walked, if they could not."""

    def suspects(self) -> set[_Key]:
        """Keys of everything that looks wrong."""
        return {*self.violations, *self.hits, *self.doubts}

    def recount(self, keys: Iterable[_Key], again: _Pass) -> None:
        """Count doubtful pages as another reading did, that looked at these alone.

        What is gone is not counted any more.
        """
        for key in keys:
            reason, number = key[0], self.doubts[key]
            self.pages.skipped[reason] -= number
            self.pages.unverified[reason] -= number
            if reason not in SWAPPED:
                self.pages.present -= number
        self.pages.add(again.pages)
        # Without those of which nothing is left.
        self.pages.skipped, self.pages.unverified = +self.pages.skipped, +self.pages.unverified

    def forget(self, keys: Iterable[_Key]) -> None:
        """Drop what did not last."""
        for key in keys:
            self.hits.pop(key, None)
            self.doubts.pop(key, None)


@dataclass(slots=True)
class ProcessResult:
    """Findings on one process, without its PID."""

    space: AddressSpace
    findings: list[Finding]
    pages: PageCounts
    incomplete: list[str]
    """What could not be checked, each without the final dot."""


class ProcessChecker:
    """Checks processes of one kernel."""

    def __init__(
        self,
        prog: drgn.Program,
        layout: Layout,
        *,
        moves: bool,
        watch: Callable[[PageBatch], None] | None = None,
    ) -> None:
        """Prepare.

        :param moves: whether the kernel runs while it is read
        :param watch: is given each page of each process as it is first read
        """
        self.prog = prog
        self._watch = watch
        self.layout = layout
        self.moves = moves
        # A dump reads the same for every process; a kernel that runs is read anew each time.
        self._memory = None if moves else snapshot_of(prog, layout)
        checks = all_checks(layout)
        self._mm_checks = [(c, c.mm) for c in checks if c.mm is not None]
        self._vma_checks = [(c, c.vma) for c in checks if c.vma is not None]
        self._page_checks = [(c, c.page) for c in checks if c.page is not None]
        self._entry_checks = [(c, c.entry) for c in checks if c.entry is not None]
        self._forest = Forest(prog, layout, checks, moves=moves)

    def check(self, mm: int, progress: Callable[[int], None] = lambda pages: None) -> ProcessResult:
        """Check one process.

        :param mm: address of its ``struct mm_struct``
        :param progress: is told the number of pages seen since the last call
        :raises drgn.FaultError: if the mm_struct cannot be read
        :raises KvirtError: if the dump is being changed
        """
        result = self._check(mm, progress)
        core = core_of(self.prog)
        if core is not None:
            core.ensure_whole()
        return result

    def _check(self, mm: int, progress: Callable[[int], None]) -> ProcessResult:
        space = self.read(mm)
        first = _Pass(space)
        result = ProcessResult(space, [], first.pages, [])
        if space.mm_users == 0:
            result.incomplete.append("the process is exiting, and its VMAs are being taken apart")
            return result
        # Before the pages, whose checks ask which trees are sound.
        families, in_peace = self._forest.check(space)
        self._check_space(first)
        self._check_pages(first, None, first.pages, progress)
        transient = self._confirm(first, result) if self.moves else set()
        first.forget(key for key in transient if key in first.doubts)
        unsettled = space.unstable or (not self.moves and bool(space.write_locked))
        result.findings = list(self._space_findings(first, transient, unsettled))
        result.findings += self._family_findings(space, families)
        result.findings += _page_findings(first.hits.values(), transient, unsettled)
        if not in_peace:
            result.incomplete.append(
                "its anon_vmas were being changed all the time, so what looked wrong in them was not settled"
                ": try again, or check a dump of the machine"
            )
        self._note_troubles(first, result, unsettled)
        return result

    def forget_latest(self) -> None:
        """Take back what the latest process was checked for on behalf of others: it is gone."""
        self._forest.forget_latest()

    def _confirm(self, first: _Pass, result: ProcessResult) -> set[_Key]:
        """Read again what looks wrong; returns the keys of what does not last."""
        suspects = first.suspects()
        transient: set[_Key] = set()
        for _ in range(patience.REREADS):
            whole, partial = self._sort_suspects(first, suspects)
            stays: set[_Key] = set()
            for keys, at in ((whole, None), (partial, self._places(first, partial))):
                if not keys:
                    continue
                doubts = keys & first.doubts.keys()
                doubtful = _addresses(doubts)
                hits = _addresses(keys & first.hits.keys())
                hits = hits[~np.isin(hits, doubtful)]
                again = self._reread(first.space.address, hits, doubtful, at)
                if again is None:
                    result.incomplete.append(
                        "what looked wrong could not be read again, because the process is exiting or "
                        "changes its mappings all the time: try again, or check a dump of the machine"
                    )
                    continue
                lasting = keys & again.suspects()
                stays |= lasting
                first.recount(doubts, again)
                # The freshest values of what repeats; the rest keeps those that it was seen with.
                first.violations.update((k, v) for k, v in again.violations.items() if k in lasting)
                first.hits.update((k, v) for k, v in again.hits.items() if k in lasting)
                first.doubts.update((k, v) for k, v in again.doubts.items() if k in lasting)
            transient |= suspects - stays
            suspects = stays
        result.incomplete[:] = dict.fromkeys(result.incomplete)
        return transient

    def _sort_suspects(self, first: _Pass, suspects: set[_Key]) -> tuple[set[_Key], set[_Key]]:
        """Those that only a reading of the whole address space can tell, and those of a place in it."""
        whole = {
            key
            for key in suspects & first.violations.keys()
            if first.violations[key][1] is None and first.violations[key][2].address is None
        }
        return whole, suspects - whole

    def _places(self, first: _Pass, keys: set[_Key]) -> frozenset[int]:
        """Addresses at which there is a VMA to be read again, for each of what looks wrong."""
        at = set()
        for key in keys:
            if key in first.hits:
                at.add(first.hits[key].range[0])
            elif key in first.violations:
                _, context, violation = first.violations[key]
                at.add(violation.address or 0 if context is None else context.vma.vm_start)
            else:
                at.add(key[1])
        return frozenset(at)

    def read(self, mm: int) -> AddressSpace:
        """Read an address space; while the kernel runs, preferably with nobody changing it.

        :raises drgn.FaultError: if the mm_struct cannot be read
        """
        space = read_address_space(self.prog, self.layout, mm, memory=self._memory)
        if self.moves:
            for _ in range(patience.TRIES):
                if not space.write_locked and space.broken_tree is None:
                    break
                time.sleep(patience.PAUSE)
                space = read_address_space(self.prog, self.layout, mm)
        return space

    def _check_space(self, into: _Pass) -> None:
        space = into.space
        found: list[tuple[Check, VmaContext | None, Violation]] = []
        for check, whole in self._mm_checks:
            found += [(check, None, violation) for violation in whole(space)]
        files = FileTrees(self.prog, self.layout, space.records.memory, moves=self.moves)
        # VMA-TREE has its say on others; while a fork copies the tree they are the parent's.
        own = [row for row, entry in enumerate(space.entries) if entry.vma.vm_mm == space.address]
        some = [self._worth_a_look(check, space, own) for check, _ in self._vma_checks]
        for at in range(0, len(space.entries), _VMAS_AT_ONCE):
            contexts = Table(partial(self._context, space, files))
            wrong: list[tuple[Check, VmaContext, Violation]] = []
            for (check, run), rows in zip(self._vma_checks, some, strict=True):
                part = rows[bisect_left(rows, at) : bisect_left(rows, at + _VMAS_AT_ONCE)]
                for context, violation in self._objections(run, [contexts[row] for row in part], into):
                    wrong.append((check, context, violation))
            # By VMA, and not by check.
            wrong.sort(key=lambda one: one[1].first)
            found += wrong
        # Numbered at each place, so that another's coming or going does not rename it.
        numbers: Counter[tuple[str, int, int]] = Counter()
        for check, about, violation in found:
            where = violation.address or 0 if about is None else about.vma.address
            place = check.id, where, 0 if about is None else about.first
            into.violations[check.id, where, numbers[place]] = (check, about, violation)
            numbers[place] += 1

    @staticmethod
    def _worth_a_look(check: Check, space: AddressSpace, own: list[int]) -> list[int]:
        """Rows of the VMAs that a check has to look at, ascending."""
        if space.columns is None or check.vma_glance is None:
            return own
        rows: list[int] = np.flatnonzero(check.vma_glance(space.columns)).tolist()
        return rows

    @staticmethod
    def _context(space: AddressSpace, files: FileTrees, row: int) -> VmaContext:
        entry = space.entries[row]
        return VmaContext(space, entry.vma, entry.first, files)

    def _objections(
        self, run: VmaRun, contexts: list[VmaContext], into: _Pass
    ) -> list[tuple[VmaContext, Violation]]:
        """What a check objects to in some VMAs, but for those of which the dump lacks a part."""
        if not contexts:
            return []
        try:
            return list(run(contexts))
        except drgn.FaultError as error:
            if not is_filtered(error):
                raise
        if len(contexts) > 1:
            return [one for context in contexts for one in self._objections(run, [context], into)]
        into.filtered += 1
        return []

    def _check_pages(
        self,
        into: _Pass,
        wanted: U64 | None,
        counts: PageCounts,
        progress: Callable[[int], None] = lambda pages: None,
    ) -> dict[int, int]:
        """Check present pages; returns the entries of those that look wrong, by address."""
        table = VmaTable(into.space, self._forest.unsound)
        sorter = Sorter(self.prog, self.layout, table)
        watch = self._watch if wanted is None else None
        by_place = any(check.by_place(table) for check, _ in self._page_checks)
        each = wanted is not None or watch is not None or by_place
        uniform = None if each else Uniform(self.prog, self.layout, table, sorter)
        seen: dict[int, int] = {}

        def judge(leaves: Leaves, folios: Folios) -> PageCounts | None:
            alone = _Pass(into.space)
            self._judge(alone, sorter.sort(leaves, alone.pages, folios), {}, None)
            return None if alone.suspects() else alone.pages

        try:
            for leaves in self._leaves(into, table, wanted):
                progress(len(leaves) * leaves.pages)
                same = None if uniform is None else uniform.judge(leaves, judge)
                if same is not None:
                    counts.add(same)
                    continue
                for part in self._blocks(leaves):
                    self._judge(into, sorter.sort(part, counts), seen, watch)
        except drgn.FaultError as error:
            into.unreadable = str(error)
        return seen

    def _blocks(self, leaves: Leaves) -> Iterable[Leaves]:
        """Entries in the numbers in which each is judged by itself."""
        # Otherwise drgn would read most of the memmap for each block, whatever their number.
        whole = core_of(self.prog) is None and leaves.are_scattered()
        return [leaves] if whole else leaves.blocks(IN_CACHE)

    def _judge(
        self,
        into: _Pass,
        sorted_: Sorted,
        seen: dict[int, int],
        watch: Callable[[PageBatch], None] | None,
    ) -> None:
        """Check the pages behind some entries; those that look wrong are added to *seen*."""
        for reason, doubtful in sorted_.doubts:
            room = max(0, HITS_MAX - len(into.doubts))
            for address, entry in zip(
                doubtful.address[:room].tolist(), doubtful.entry[:room].tolist(), strict=True
            ):
                into.doubts[reason, address, 0] = doubtful.pages
                seen[address] = entry
        batch = sorted_.batch
        if len(batch.address):
            if watch is not None:
                watch(batch)
            for check, page in self._page_checks:
                _note_pages(into, check, page(batch), batch, sorted_.leaves, seen)
        for entries, absent in sorted_.entries:
            if len(entries.address):
                for check, entry_run in self._entry_checks:
                    _note_pages(into, check, entry_run(entries), entries, absent, seen)

    def _leaves(self, into: _Pass, table: VmaTable, wanted: U64 | None) -> Iterator[Leaves]:
        """Entries to be judged together: those of a VMA that has many, and all others."""
        left: list[Leaves] = []
        since = 0.0
        for leaves in for_each_leaf(self.prog, self.layout, into.space.pgd, into.troubles, wanted):
            if wanted is not None:
                # What begins elsewhere is another mapping of that place.
                leaves = leaves.take(np.isin(leaves.address, wanted))
            for part in table.parts(leaves):
                few = leaves.part(part)
                if leaves.level or len(few) >= MANY:
                    yield few
                else:
                    since = since if left else time.monotonic()
                    # All that they were read with is not to be kept until then: of each 256 MiB a MiB.
                    left.append(few.copy())
                # While the kernel runs, its pages are looked at soon after their entries.
                late = self.moves and time.monotonic() - since > patience.LEFT
                if left and (late or sum(map(len, left)) >= _LEFT_MAX):
                    yield join(left)
                    left.clear()
        if left:
            yield join(left)

    def _reread(self, mm: int, hits: U64, doubts: U64, at: frozenset[int] | None) -> _Pass | None:
        """Read again what looked wrong: VMAs, entries and folios together, and nothing changing.

        Returns None if the process is gone or its mappings never stand still.

        :param mm: address of the ``struct mm_struct``
        :param hits: sorted addresses of pages to look at
        :param doubts: and of those to be counted as well
        :param at: addresses of the VMAs to read; None for all of them
        """
        for _ in range(patience.TRIES):
            time.sleep(patience.PAUSE)
            try:
                again = _Pass(read_address_space(self.prog, self.layout, mm, at=at))
                if again.space.mm_users == 0:
                    return None
                if again.space.write_locked:
                    continue
                self._check_space(again)
                if len(hits) or len(doubts):
                    entries = self._check_pages(again, hits, PageCounts()) if len(hits) else {}
                    if len(doubts):
                        entries.update(self._check_pages(again, doubts, again.pages))
                    changed = self._changed(again, entries)
                    # Only these: one page that comes and goes does not excuse the others.
                    again.forget([k for k in (*again.hits, *again.doubts) if k[1] in changed])
                if not mm_unchanged(self.prog, again.space):
                    continue
            except drgn.FaultError:
                continue
            return again
        return None

    def _changed(self, again: _Pass, entries: dict[int, int]) -> set[int]:
        """Addresses whose entries are not those any more that were judged."""
        wanted = np.array(sorted(entries), dtype=np.uint64)
        now: dict[int, int] = {}
        for leaves in for_each_leaf(self.prog, self.layout, again.space.pgd, WalkTroubles(), wanted):
            now.update(zip(leaves.address.tolist(), leaves.entry.tolist(), strict=True))
        ignored = ~self.layout.pgtable.touched
        return {a for a, e in entries.items() if now.get(a, 0) & ignored != e & ignored}

    def _note_troubles(self, first: _Pass, result: ProcessResult, unsettled: bool) -> None:
        note = result.incomplete.append
        space = first.space
        if space.broken_tree is not None and self.moves:
            note("its VMAs changed all the time while they were listed, so some may be missing: try again")
        if first.filtered:
            note(
                f"{first.filtered} checks of its VMAs were not done, because the dump lacks parts of the "
                "trees that they are in"
            )
        if self._forest.filtered:
            note(
                f"{self._forest.filtered} of the families of its anon_vmas were not checked, because the "
                "dump lacks parts of them"
            )
        if first.unreadable is not None:
            note(f"its page tables cannot be read ({first.unreadable}), so no more pages were checked")
        tables = first.troubles.unreadable
        if tables and not (self.moves and self._tables_are_back(space, tables)):
            note(
                f"{len(tables)} of its page tables cannot be read, the first for address {tables[0]:#x}: "
                "the dump may lack them, or they are damaged"
            )
        lost = sum(file is None for file in space.files.values())
        if lost:
            note(f"{lost} of the files that it maps cannot be read, so their pages' indexes were not checked")
        for reason in DOUBTS:
            found = {address: n for (r, address, _), n in first.doubts.items() if r == reason}
            if found:
                note(f"{sum(found.values())} {reason}, the first at {min(found):#x}: worth a look")
        if first.overflow:
            note(f"{first.overflow} more pages look wrong and were not looked at one by one")
        if space.unstable:
            note("the OOM killer has taken memory from it, so nothing in it is held to be wrong")
        elif unsettled and result.findings:
            note(
                "its mmap_lock is held for write, so what looks wrong may be a change under way: look at "
                "what the holder was doing"
            )

    def _tables_are_back(self, space: AddressSpace, addresses: list[int]) -> bool:
        """Whether page tables that could not be read can be now, or are gone."""
        again = WalkTroubles()
        wanted = np.array(sorted(addresses), dtype=np.uint64)
        try:
            for _ in for_each_leaf(self.prog, self.layout, space.pgd, again, wanted):
                pass
        except drgn.FaultError:
            return False
        return not again.unreadable

    def _space_findings(self, from_: _Pass, transient: set[_Key], unsettled: bool) -> Iterator[Finding]:
        for key, (check, context, violation) in from_.violations.items():
            severity = violation.severity or check.severity
            if key in transient or unsettled or (check.faulting and _anon_vma_locked(context)):
                severity = Severity.TRANSIENT
            yield _finding(check, severity, violation, None if context is None else context.vma)

    def _family_findings(self, space: AddressSpace, families: list[FamilyViolation]) -> Iterator[Finding]:
        owners: dict[int, int] | None = None
        for one in families:
            violation, vma = one.violation, one.violation.vma
            finding = _finding(one.check, one.severity, violation, vma)
            if vma is not None and vma.vm_mm != space.address:
                if owners is None:
                    owners = {p.mm: p.pid for p in for_each_process(self.prog, moves=self.moves).found}
                if vma.vm_mm in owners:
                    finding = replace(finding, pid=owners[vma.vm_mm])
                else:
                    message = f"{finding.message} (in the mm {vma.vm_mm:#x}, which no task has)"
                    finding = replace(finding, message=message)
            yield finding


def _finding(check: Check, severity: Severity, violation: Violation, vma: Vma | None) -> Finding:
    return Finding(
        check.id,
        severity,
        violation.message,
        vma=None if vma is None else (vma.vm_start, vma.vm_end),
        address=violation.address,
        expected=violation.expected,
        actual=violation.actual,
    )


def _addresses(keys: Iterable[_Key]) -> U64:
    """Their addresses, sorted."""
    return np.array(sorted({address for _, address, _ in keys}), dtype=np.uint64)


def _anon_vma_locked(context: VmaContext | None) -> bool:
    """Whether the first fault in the VMA may be under way: __anon_vma_prepare(), mm/rmap.c.

    It holds mmap_lock for read only, sets the pointer and then fills the chain, both with the new
    anon_vma locked.
    """
    if context is None:
        return False
    own = context.anon_vma(context.vma.anon_vma)
    return own is not None and bool(own.write_locked)


def _note_pages(
    into: _Pass, check: Check, bad: PageViolations, batch: PageBatch, leaves: Leaves, seen: dict[int, int]
) -> None:
    """Remember what a check objects to, up to HITS_MAX, and the entries it was seen in.

    Beyond that the first page of each VMA: a small one would be lost behind large ones otherwise.
    """
    if not bad.mask.any():
        return
    where = np.flatnonzero(bad.mask)
    room = max(0, HITS_MAX - len(into.hits))
    some, rest, vmas = where[:room], where[room:], batch.table.vmas
    into.told.update((check.id, vmas[row].address) for row in np.unique(batch.row[some]).tolist())
    noted = some.tolist()
    for i in rest[np.unique(batch.row[rest], return_index=True)[1]].tolist():
        place = check.id, vmas[int(batch.row[i])].address
        if place not in into.told and len(into.told) < HITS_MAX:
            into.told.add(place)
            noted.append(i)
    into.overflow += (len(where) - len(noted)) * batch.pages
    for i in noted:
        vma = vmas[int(batch.row[i])]
        legal = bad.legal is not None and bool(bad.legal[i])
        hit = _PageHit(
            check,
            Severity.INFO if legal else check.severity,
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


def _page_findings(hits: Iterable[_PageHit], transient: set[_Key], unsettled: bool) -> Iterator[Finding]:
    """One finding for all pages of a VMA that are wrong in the same way, at the first of them.

    VMAs are in the order of their addresses, whichever of their pages were looked at first.
    """
    groups: dict[tuple[str, int, int, Severity], list[_PageHit]] = {}
    for hit in hits:
        severity = Severity.TRANSIENT if unsettled or hit.key in transient else hit.severity
        key = hit.check.id, hit.vma, hit.check.alike(hit.expected, hit.actual), severity
        groups.setdefault(key, []).append(hit)
    for (id_, _, _, severity), group in sorted(groups.items(), key=lambda item: item[1][0].range):
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
