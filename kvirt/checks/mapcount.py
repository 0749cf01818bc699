# SPDX-License-Identifier: GPL-2.0-only
"""Whether anonymous folios are mapped as often as they count. That takes every process of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import drgn
import numpy as np
import numpy.typing as npt
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.sched import cpu_curr

from kvirt.checks.registry import PageBatch, machine_check, within_hugetlb
from kvirt.filtered import is_filtered
from kvirt.findings import Finding, Severity
from kvirt.layout import Layout
from kvirt.mm.arrays import each
from kvirt.mm.folio import I64, read_folios
from kvirt.mm.forest import read_family
from kvirt.mm.pagetable import U64, Bool
from kvirt.mm.rmap import anon_vma_reader

ID = "FOLIO-MAPCOUNT"
# Folios that are held up by name; so many are looked at once more, and the rest is counted.
_FINDINGS_MAX = 4096
# Page frames of which one array of bits tells whether their count was met: 32 KiB each.
_CHUNK = 1 << 18
_CHUNKS_AT_ONCE = 8
# Blocks are put together when they have so many folios, or as many as there were before.
_BLOCK = 1 << 16

Table = npt.NDArray[np.void]
_ROW = np.dtype(
    [
        ("head", "<u8"),
        ("found", "<i8"),
        ("count", "<i8"),
        # Where it was met first.
        ("address", "<u8"),
        ("start", "<u8"),
        ("end", "<u8"),
        ("pid", "<i8"),
    ]
)


def _not_one(count: I64) -> Bool:
    several: Bool = count != 1
    return several


def _is_zero(number: U64) -> Bool:
    zero: Bool = number == 0
    return zero


def _add_up(table: Table) -> Table:
    """One row a folio."""
    _, first, where = np.unique(table["head"], return_index=True, return_inverse=True)
    merged: Table = table[first]
    merged["found"] = np.bincount(where, weights=table["found"]).astype(np.int64)
    return merged


class _Bits:
    """Page frames whose folios' counts were met: a bit each, where there are any."""

    def __init__(self) -> None:
        self._chunks: dict[int, npt.NDArray[np.uint8]] = {}

    def _split(self, frames: U64) -> Iterator[tuple[int, npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
        chunk = (frames // np.uint64(_CHUNK)).astype(np.intp)
        for number in np.unique(chunk).tolist():
            where = np.flatnonzero(chunk == number)
            yield number, where, (frames[where] % np.uint64(_CHUNK)).astype(np.intp)

    def set(self, frames: U64) -> None:
        for number, _, at in self._split(frames):
            bits = self._chunks.setdefault(number, np.zeros(_CHUNK // 8, dtype=np.uint8))
            np.bitwise_or.at(bits, at >> 3, (1 << (at & 7)).astype(np.uint8))

    def claim(self, frames: U64) -> bool:
        """Set page frames that are all different and of which none is set; False, and nothing done, if not.

        False too if they are too far apart to see that quickly.
        """
        first, last = int(frames.min()) // _CHUNK, int(frames.max()) // _CHUNK
        if last - first >= _CHUNKS_AT_ONCE:
            return False
        mask = np.zeros((last - first + 1) * _CHUNK, dtype=bool)
        mask[(frames - np.uint64(first * _CHUNK)).view(np.int64)] = True
        if np.count_nonzero(mask) != len(frames):
            return False
        bits = dict(enumerate(np.packbits(mask, bitorder="little").reshape(-1, _CHUNK // 8), first))
        if any((bits[n] & self._chunks[n]).any() for n in bits if n in self._chunks):
            return False
        for number, new in bits.items():
            if number in self._chunks:
                self._chunks[number] |= new
            elif new.any():
                self._chunks[number] = new.copy()
        return True

    def test(self, frames: U64) -> npt.NDArray[np.bool_]:
        out = np.zeros(len(frames), dtype=bool)
        for number, where, at in self._split(frames):
            bits = self._chunks.get(number)
            if bits is not None:
                out[where] = (bits[at >> 3] >> (at & 7).astype(np.uint8)) & 1
        return out


@machine_check(
    ID,
    Severity.WARNING,
    says="An anonymous folio is mapped by as many entries as it counts.",
    relied_on="folio_mapcount() and all that reuses or frees by it, mm/memory.c",
)
@dataclass(slots=True)
class FolioMapcounts:
    """Adds up the entries of all processes.

    Looked at by check-all on dumps only, and only if every process could be read whole and none is exiting:
    else there are entries that nobody has seen. Large folios are left out on kernels that do not count all
    their mappings in one place (before 6.10), and folios of which a page is migrating, a device's or
    poisoned. A folio that is locked, or mapped by a process that was running on a processor, is transient.
    """

    prog: drgn.Program
    layout: Layout
    pid: int = 0
    """Of the process that is read now."""
    skipped: str | None = None
    """Why the check means nothing for this machine, if it does not; a half-sentence."""
    _pending: Table = field(default_factory=lambda: np.zeros(0, dtype=_ROW))
    """Folios with entries still to come."""
    _blocks: list[Table] = field(default_factory=list)
    _too_often: Table = field(default_factory=lambda: np.zeros(0, dtype=_ROW))
    """Folios that were met again after their count was."""
    _left_out: list[U64] = field(default_factory=list)
    _met: _Bits = field(default_factory=_Bits)
    _mms: set[int] = field(default_factory=set)
    _running: dict[int, set[int]] = field(default_factory=dict)
    """anon_vmas of the processes that were running on a processor, by mm."""

    def __post_init__(self) -> None:
        try:
            for cpu in for_each_online_cpu(self.prog):
                mm = cpu_curr(self.prog, cpu).mm
                if mm:
                    self._running[mm.value_()] = set()
        except (drgn.FaultError, LookupError, ValueError) as error:
            self.skip(f"it cannot be told which processes were running ({error})")

    def skip(self, why: str) -> None:
        """Give up, for a reason."""
        self.skipped = self.skipped or why
        self._pending, self._blocks = self._pending[:0], []

    def add(self, batch: PageBatch) -> None:
        """Count the entries of a batch. What memory it takes is that of folios with entries still to come."""
        if self.skipped is not None:
            return
        space, folios = batch.table.space, batch.folios
        if space.address not in self._mms:
            self._mms.add(space.address)
            if space.address in self._running:
                self._running[space.address] = set(space.anon_vmas)
        anonymous = folios.is_anon() | folios.is_ksm()
        absent = anonymous & ~batch.present
        if absent.any():
            self._left_out.append(np.unique(folios.head[absent]))
        # A hugetlb page counts one mapping, however many entries that takes.
        first_entry = each(_is_zero, within_hugetlb(batch.table, batch.address, batch.row))
        judged = anonymous & batch.present & first_entry
        if "large_mapcount" not in self.layout.large_counts:
            judged &= ~folios.large
        if not judged.any():
            return
        # Most are small, and mapped once: their counts are met here and now.
        ordinary = judged.all() and not folios.large.any()
        ordinary = ordinary and not each(_not_one, folios.page_mapcount).any()
        if ordinary and self._met.claim(folios.head):
            return
        where = np.flatnonzero(judged)
        heads, first, found = np.unique(folios.head[where], return_index=True, return_counts=True)
        first = where[first]
        block = np.zeros(len(heads), dtype=_ROW)
        block["head"], block["found"] = heads, found
        count = np.where(folios.large, folios.large_mapcount, folios.page_mapcount)
        block["count"] = count[first]
        block["address"] = batch.address[first]
        block["start"] = batch.table.start[batch.row[first]]
        block["end"] = batch.table.end[batch.row[first]]
        block["pid"] = self.pid
        again = self._met.test(heads)
        if again.any():
            room = max(0, _FINDINGS_MAX - len(self._too_often))
            self._too_often = np.concatenate((self._too_often, block[again][:room]))
            block = block[~again]
        self._blocks.append(self._drop_met(block))
        if sum(map(len, self._blocks)) > max(_BLOCK, len(self._pending)):
            self._consolidate()

    def _drop_met(self, table: Table) -> Table:
        met = table["found"] == table["count"]
        self._met.set(table["head"][met])
        rest: Table = table[~met]
        return rest

    def _consolidate(self) -> None:
        merged = _add_up(np.concatenate((self._pending, *self._blocks)))
        self._blocks = []
        self._pending = self._drop_met(merged)

    def findings(self) -> Iterator[Finding]:
        """What does not add up, once all processes have been added."""
        if self.skipped is not None:
            return
        self._consolidate()
        # Whose count was met by one process alone, and has entries of others besides.
        both = self._met.test(self._pending["head"])
        too_often = _add_up(np.concatenate((self._too_often, self._pending[both])))
        too_often["found"] += too_often["count"]
        wrong = np.concatenate((too_often, self._pending[~both]))
        if self._left_out:
            wrong = wrong[~np.isin(wrong["head"], np.concatenate(self._left_out))]
        shown = wrong[:_FINDINGS_MAX]
        folios = read_folios(self.prog, self.layout, shown["head"])
        locked = (folios.flags & np.uint64(self.layout.pg_locked)) != 0
        anon_vmas = np.where(folios.is_anon(), folios.anon_vma(), np.uint64(0))
        hidden: dict[int, bool] = {}
        groups: dict[tuple[int, int, int, Severity], list[int]] = {}
        for i, (row, is_locked, anon_vma) in enumerate(
            zip(shown, locked.tolist(), anon_vmas.tolist(), strict=True)
        ):
            unseen = row["found"] < row["count"] and self._is_mapped_unseen(anon_vma, hidden)
            busy = is_locked or unseen or any(anon_vma in known for known in self._running.values())
            severity = Severity.TRANSIENT if busy else Severity.WARNING
            key = int(row["pid"]), int(row["start"]), int(row["found"] - row["count"]), severity
            groups.setdefault(key, []).append(i)
        for (pid, _, _, severity), members in groups.items():
            first = min(shown[members], key=lambda row: int(row["address"]))
            found, count = int(first["found"]), int(first["count"])
            yield Finding(
                ID,
                severity,
                f"the folio at page frame {int(first['head']):#x} counts {count} mappings, and {found} were "
                "found in all processes together",
                pid=pid,
                vma=(int(first["start"]), int(first["end"])),
                address=int(first["address"]),
                expected=found,
                actual=count,
                pages=int(folios.nr_pages[members].sum()),
            )
        if len(wrong) > len(shown):
            yield Finding(
                ID,
                Severity.WARNING,
                f"{len(wrong) - len(shown)} more folios do not add up: look at these first",
            )

    def _is_mapped_unseen(self, anon_vma: int, hidden: dict[int, bool]) -> bool:
        """Whether VMAs of an address space that no task has may map a folio: an exec builds one."""
        if not anon_vma:
            return False
        if anon_vma not in hidden:
            try:
                root = anon_vma_reader(self.prog, self.layout)(anon_vma).root
                family = read_family(self.prog, self.layout, root, ())
            except drgn.FaultError as error:
                # Damage: FOLIO-ANON-VMA has its say on it.
                hidden[anon_vma] = is_filtered(error)
            else:
                hidden[anon_vma] = any(vma.vm_mm not in self._mms for vma in family.vmas.values())
        return hidden[anon_vma]
