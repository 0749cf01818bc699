# SPDX-License-Identifier: GPL-2.0-only
"""Runs the checks on families of anon_vmas, each family once, however many processes are in it."""

from __future__ import annotations

import time
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import drgn
import numpy as np

from kvirt.checks import patience
from kvirt.checks.registry import Check, Violation
from kvirt.filtered import is_filtered
from kvirt.findings import Severity
from kvirt.layout import Layout
from kvirt.mm.address_space import AddressSpace
from kvirt.mm.forest import AnonTree, Family, FamilyReader, MmState, read_family, read_mm_state
from kvirt.mm.grove import read_groves

_ACCUSING = (Severity.ERROR, Severity.WARNING)

# What is told of families is remembered up to here. Bounds memory when everything is wrong.
_TOLD_MAX = 1 << 16

_Key = tuple[str, int, int, str]


@dataclass(frozen=True, slots=True)
class FamilyViolation:
    """What a check on a family objects to, as it is to be reported."""

    check: Check
    violation: Violation
    severity: Severity


class Forest:
    """The families of one kernel, as far as they have been checked."""

    def __init__(
        self,
        prog: drgn.Program,
        layout: Layout,
        checks: list[Check],
        *,
        moves: bool,
    ) -> None:
        """Prepare.

        :param moves: whether the kernel runs while it is read
        """
        self._prog = prog
        self._layout = layout
        self._checks = [(check, check.family) for check in checks if check.family is not None]
        self._glances = [check.family_glance for check, _ in self._checks]
        self._moves = moves
        # VMAs of families that other processes belong to as well, by root: not to be looked at again.
        # Sorted addresses, in as little memory as can be: there may be millions.
        self._done: dict[int, array[int]] = {}
        self._latest: list[int] = []
        # What was told of families that had to be read again, because damage hid some of their VMAs.
        self._told: set[_Key] = set()
        self._told_latest: set[_Key] = set()
        self.filtered = 0
        """Families of the latest process that were not judged: a part of them was left out of the dump."""
        self.unsound: dict[int, AnonTree] = {}
        """Trees in which the kernel may not find what is there, by anon_vma. Kept, for there are few."""

    def check(self, space: AddressSpace) -> tuple[list[FamilyViolation], bool]:
        """Check the families of a process, but for those that were checked with another one.

        :return: what is wrong, and whether all of it could be looked at in peace
        """
        reader = FamilyReader(self._layout, space.records, _listed(space))
        found: list[FamilyViolation] = []
        quiet = True
        self._latest = []
        self._told_latest = set()
        self.filtered = 0
        members = {root: vmas for root, vmas in _members(space) if not self._is_done(root, vmas)}
        for root, shared in self._sound(space, members, reader):
            del members[root]
            if shared is not None:
                self._note_done(root, shared)
        for root, vmas in members.items():
            try:
                family, violations, settled = self._check_family(root, vmas, reader)
            except drgn.FaultError as error:
                if not is_filtered(error):
                    raise
                self.filtered += 1
                continue
            quiet &= settled
            found += violations
            if family.shared():
                self._note_done(root, sorted(family.vmas))
        return found, quiet

    def _is_done(self, root: int, vmas: list[int]) -> bool:
        """Whether a family was looked at, with all of some VMAs."""
        known = self._done.get(root)
        return known is not None and all(known[bisect_right(known, vma) - 1] == vma for vma in vmas)

    def _note_done(self, root: int, vmas: list[int]) -> None:
        self._done[root] = array("Q", vmas)
        self._latest.append(root)

    def _sound(
        self, space: AddressSpace, members: dict[int, list[int]], reader: FamilyReader
    ) -> Iterator[tuple[int, list[int] | None]]:
        """Families of which no check has anything to say, found out for all of them together.

        :return: their roots; and the VMAs of those that other processes belong to, ascending
        """
        columns = space.columns
        glances = [glance for glance in self._glances if glance is not None]
        if not members or columns is None or len(glances) < len(self._glances):
            return

        def attached(mm: int, vmas: list[tuple[int, int]]) -> bool:
            reader.forget_trees()
            return reader.has_attached(mm, vmas)

        roots = columns.finder.find(np.fromiter(members, dtype=np.uint64, count=len(members)))
        for grove in read_groves(space.records.memory, columns, roots, attached):
            doubtful = np.logical_or.reduce([glance(grove) for glance in glances])
            unsound = set(grove.root[doubtful].tolist())
            of = grove.roots()
            others = set(of[grove.vm_mm != np.uint64(space.address)].tolist())
            for row in set(of.tolist()) - unsound:
                vmas = sorted(grove.vma[of == row].tolist()) if row in others else None
                yield int(grove.address[row]), vmas

    def forget_latest(self) -> None:
        """Have the families of the latest process checked again with the next one that is in them.

        For when that process turns out to be gone, so that nothing that was found with it counts.
        """
        for root in self._latest:
            self._done.pop(root, None)
        self._told -= self._told_latest
        self._latest, self._told_latest = [], set()

    def _violations(self, family: Family) -> dict[_Key, FamilyViolation]:
        found = {}
        for check, run in self._checks:
            for violation in run(family):
                severity = violation.severity or check.severity
                where = violation.vma.address if violation.vma is not None else 0
                key = check.id, violation.address or 0, where, violation.message
                found[key] = FamilyViolation(check, violation, severity)
        return found

    def _check_family(
        self, root: int, members: list[int], reader: FamilyReader
    ) -> tuple[Family, list[FamilyViolation], bool]:
        family = reader.read(root, members)
        found = self._violations(family)
        if self._moves and (found or family.lost or not family.whole):
            # The process was read over a long time. Where that leaves anything to be said, or not judged,
            # nothing counts that was read then: the family is read by itself, within as short a time as
            # can be.
            family = read_family(self._prog, self._layout, root, members)
            found = self._violations(family)
        if not found:
            return family, [], True
        settled = True
        transient: set[_Key] = set()
        if self._moves:
            for _ in range(patience.REREADS):
                suspects = {key for key, one in found.items() if one.severity in _ACCUSING} - transient
                if not suspects:
                    break
                again = self._settle(root, members)
                if again is None:
                    transient |= suspects
                    settled = False
                    break
                family = again
                fresh = self._violations(family)
                transient |= suspects - fresh.keys()
                found.update((key, value) for key, value in fresh.items() if key in suspects)
        elif family.locked or any(mm.write_locked for mm in family.mms.values()):
            transient = set(found)
            settled = not any(one.severity in _ACCUSING for one in found.values())
        out = []
        for key, one in found.items():
            if key in transient:
                one = FamilyViolation(one.check, one.violation, Severity.TRANSIENT)
            elif one.severity in _ACCUSING:
                if key in self._told:
                    continue
                self._told_latest.add(key)
            out.append(one)
        if len(self._told) < _TOLD_MAX:
            self._told |= self._told_latest
        if any(one.severity is Severity.ERROR for key, one in found.items() if key not in transient):
            self.unsound.update(family.trees)
        return family, out, settled

    def _settle(self, root: int, members: list[int]) -> Family | None:
        """Read a family with nobody changing it meanwhile; None if that does not happen."""
        for _ in range(patience.TRIES):
            time.sleep(patience.PAUSE)
            first = read_family(self._prog, self._layout, root, members)
            before = self._states(first)
            second = read_family(self._prog, self._layout, root, members)
            # Faults add to a family under its own lock alone, and show as a difference; all else holds
            # the mmap_lock of a process in it, which is counted.
            if (
                not second.locked
                and before == self._states(second)
                and not any(state is not None and state.write_locked for state in before.values())
                and _alike(first, second)
            ):
                return second
        return None

    def _states(self, family: Family) -> dict[int, MmState | None]:
        return {mm: read_mm_state(self._prog, self._layout, mm) for mm in family.mms}


def _listed(space: AddressSpace) -> set[int]:
    """Which VMAs of a process are in its maple tree where they begin."""
    columns = space.columns
    if columns is None:
        own = (entry for entry in space.entries if entry.vma.vm_mm == space.address)
        return {entry.vma.address for entry in own if entry.first <= entry.vma.vm_start <= entry.last}
    start = columns.vmas["vm_start"]
    return set(columns.address[(columns.first <= start) & (start <= columns.last)].tolist())


def _members(space: AddressSpace) -> Iterable[tuple[int, list[int]]]:
    """Roots of a process's anon_vmas, each with the VMAs that have it; both by their first addresses."""
    columns, members = space.columns, dict[int, list[int]]()
    links: Iterable[tuple[int, int]]
    if columns is not None:
        order = np.argsort(columns.links.vma, kind="stable")
        vma, anon_vma = columns.links.vma[order], columns.link_anon_vma[order]
        roots, vmas = columns.anon_vmas[columns.root[anon_vma]].tolist(), columns.address[vma].tolist()
        links = zip(roots, vmas, strict=True)
    else:
        links = _links(space)
    for root, address in links:
        some = members.setdefault(root, [])
        if not some or some[-1] != address:
            some.append(address)
    return members.items()


def _links(space: AddressSpace) -> Iterator[tuple[int, int]]:
    """Root and VMA of each link of a process's chains."""
    for vma in space.vmas():
        if vma.vm_mm == space.address:
            for link in space.chain(vma).links:
                anon_vma = space.anon_vmas.get(link.anon_vma)
                if anon_vma is not None:
                    yield anon_vma.root, vma.address


def _alike(first: Family, second: Family) -> bool:
    return (
        first.anon_vmas == second.anon_vmas
        and first.trees == second.trees
        and first.vmas == second.vmas
        and first.chains == second.chains
    )
