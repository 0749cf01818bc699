# SPDX-License-Identifier: GPL-2.0-only
"""The list of invariants, and what a check is given to look at."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvirt.findings import Severity
from kvirt.layout import Layout
from kvirt.mm.address_space import AddressSpace
from kvirt.mm.arrays import Scalar, constant, is_constant, pick, take
from kvirt.mm.columns import Columns
from kvirt.mm.folio import Folios
from kvirt.mm.forest import AnonTree, Family
from kvirt.mm.grove import Grove
from kvirt.mm.i_mmap import FilePlace, FileTrees
from kvirt.mm.ksm import RmapItems
from kvirt.mm.pagetable import U64, Bool, Leaves
from kvirt.mm.rmap import AnonVma, Chain
from kvirt.mm.vma import Vma, vma_is_cow_mapping, vma_is_pure_anon, vma_is_temporary_stack


@dataclass(frozen=True, slots=True)
class Violation:
    """What a check on anything but pages objects to."""

    message: str
    expected: int | None = None
    actual: int | None = None
    address: int | None = None
    severity: Severity | None = None
    """Where it differs from the invariant's own."""
    vma: Vma | None = None
    """The VMA that it is about, where the check was not asked about one VMA."""


@dataclass(eq=False)
class VmaContext:
    """One VMA with its chain. Not to be changed."""

    space: AddressSpace
    vma: Vma
    first: int
    """First address of its entry in the maple tree."""
    file_trees: FileTrees

    @cached_property
    def chain(self) -> Chain:
        """Its chain."""
        return self.space.chain(self.vma)

    @cached_property
    def file_place(self) -> FilePlace | None:
        """Its place in the tree of its file's mappings; None if it has no file, or if that cannot be read."""
        file = self.space.file(self.vma)
        return None if file is None else self.file_trees.place(self.vma, file.f_mapping)

    def anon_vma(self, address: int) -> AnonVma | None:
        """An anon_vma that was read with the process, None if it could not be."""
        return self.space.anon_vmas.get(address)

    def violation(
        self,
        message: str,
        *,
        expected: int | None = None,
        actual: int | None = None,
        severity: Severity | None = None,
    ) -> tuple[VmaContext, Violation]:
        """What a check objects to in this VMA."""
        return self, Violation(message, expected, actual, severity=severity)


class _Kinds:
    """Things of which many are of the same kind."""

    def __init__(self, kinds: Iterable[int]) -> None:
        self.first: list[int] = []
        """The first thing of each kind."""
        number: dict[int, int] = {}
        of = []
        for i, kind in enumerate(kinds):
            if kind not in number:
                number[kind] = len(self.first)
                self.first.append(i)
            of.append(number[kind])
        self._of = np.array(of, dtype=np.intp)

    def spread(self, values: Iterable[int], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
        """What each thing has, by what its kind has."""
        return np.array(list(values), dtype=dtype)[self._of]


# At least so many pages of one VMA are worth a look of their own.
MANY = 2048


class VmaTable:
    """The VMAs of a process as arrays, to judge many pages at once."""

    def __init__(self, space: AddressSpace, unsound: Mapping[int, AnonTree] | None = None) -> None:
        """Prepare.

        :param unsound: trees in which the kernel may not find what is there, by anon_vma
        """
        self.unsound = unsound or {}
        vmas = list(space.vmas())
        order = sorted(range(len(vmas)), key=lambda row: vmas[row].vm_start)
        self._columns_row = np.array(order, dtype=np.intp)
        self.vmas = [vmas[row] for row in order]
        self.space = space
        # All but the layout: side by side, a member for a column.
        names = Vma._fields[1:]
        members = np.array([vma[1:] for vma in self.vmas], dtype=np.uint64).reshape(-1, len(names))
        column: dict[str, U64] = dict(zip(names, np.ascontiguousarray(members.T), strict=True))
        self.start, self.end = column["vm_start"], column["vm_end"]
        self.anon_pgoff, self.vm_pgoff = column["anon_pgoff"], column["vm_pgoff"]
        self.anon_vma = column["anon_vma"]
        # Many VMAs are alike in what follows, which is worked out once for each kind.
        flags, files = _Kinds(column["vm_flags"].tolist()), _Kinds(column["vm_file"].tolist())
        some = [self.vmas[i] for i in flags.first]
        mapped = [space.file(self.vmas[i]) for i in files.first]
        self.cow = flags.spread(map(vma_is_cow_mapping, some), np.bool_)
        self.temporary_stack = flags.spread(map(vma_is_temporary_stack, some), np.bool_)
        # Pages in these are not told from others by what they are, or are no page cache.
        self.raw = flags.spread((v.flag("PFNMAP") or v.flag("MIXEDMAP") for v in some), np.bool_)
        self.dax = files.spread((file is not None and file.dax for file in mapped), np.bool_)
        self.pure = np.array([vma_is_pure_anon(v) for v in self.vmas], dtype=np.bool_)
        self.f_mapping = files.spread((0 if file is None else file.f_mapping for file in mapped), np.uint64)
        orders = (0 if f is None else max(f.blkbits - space.layout.page_shift, 0) for f in mapped)
        hugetlb = flags.spread((v.flag("HUGETLB") for v in some), np.uint64)
        self.hugetlb_order = files.spread(orders, np.uint64) * hugetlb
        """Of the huge pages that a VMA is made of; 0 if it is not of hugetlb, or its file cannot be read."""

    def at(self, values: Bool, row: npt.NDArray[np.intp]) -> Bool:
        """What the VMA of each row has; no VMA, nothing."""
        if not self.vmas:
            return constant(np.bool_(False), len(row))
        return pick(values, row)

    def off_chain(self, rows: npt.NDArray[np.intp], anon_vmas: U64, *, unfaulted: bool) -> Bool:
        """Which anon_vmas are not in the chains of VMAs, one of each (:meth:`PageBatch.off_chain`)."""
        columns = self.space.columns
        if columns is not None:
            off = ~columns.in_chain(self._columns_row[rows], columns.finder.find(anon_vmas))
            return off | (self.anon_vma[rows] == 0) if unfaulted else off
        verdicts: dict[tuple[int, int], bool] = {}
        pairs = list(zip(rows.tolist(), anon_vmas.tolist(), strict=True))
        for row, anon_vma in set(pairs):
            vma = self.vmas[row]
            chain = self.space.chain(vma)
            out = anon_vma not in chain.anon_vmas() or (unfaulted and vma.anon_vma == 0)
            verdicts[row, anon_vma] = chain.broken is None and out
        return np.array([verdicts[pair] for pair in pairs], dtype=bool)

    def parts(self, leaves: Leaves) -> Iterator[slice]:
        """Slices of entries in which those of a VMA with many of them are by themselves.

        What they have in common is then looked at once.
        """
        cuts = {0, len(leaves)}
        if self.vmas and len(leaves) >= MANY:
            first, last = self._rows(*leaves.ends())
            rows = slice(max(first, 0), last + 1)
            begins, ends = leaves.search(self.start[rows]), leaves.search(self.end[rows])
            many = ends - begins >= MANY
            cuts |= {*begins[many].tolist(), *ends[many].tolist()}
        for begin, end in itertools.pairwise(sorted(cuts)):
            yield slice(begin, end)

    def covering(self, first: int, last: int) -> int | None:
        """Row of the VMA that covers two addresses and all between, as :meth:`find` tells it.

        None if there is none; or if another one begins between them, which only damaged VMAs do.
        """
        row, other = self._rows(first, last)
        return row if row == other and row >= 0 and np.uint64(last) < self.end[row] else None

    def _rows(self, first: int, last: int) -> tuple[int, int]:
        """Row of the VMA that begins last before each of two addresses, or there; -1 if none does."""
        rows = np.searchsorted(self.start, np.array([first, last], dtype=np.uint64), side="right") - 1
        return int(rows[0]), int(rows[1])

    def find(self, addresses: U64) -> npt.NDArray[np.intp]:
        """Row of the VMA that covers each address, -1 if none does.

        :param addresses: ascending
        """
        if not self.vmas or not len(addresses):
            return np.full(len(addresses), -1, dtype=np.intp)
        first, last = self._rows(*addresses[[0, -1]].tolist())
        if first == last and first >= 0 and addresses[-1] < self.end[first]:
            return constant(np.intp(first), len(addresses))
        # Each VMA is looked for among the addresses: there are fewer of them.
        rows = np.arange(first, last + 1)
        begins = np.searchsorted(addresses, self.start[first + 1 : last + 1])
        row = np.repeat(rows, np.diff(begins, prepend=0, append=len(addresses)))
        row[addresses >= self.end[row]] = -1
        return row


def within_hugetlb(table: VmaTable, address: U64, row: npt.NDArray[np.intp]) -> U64:
    """Base pages from the beginning of the hugetlb page that each entry belongs to; 0 for all others.

    Several entries map one where the processor has contiguous ranges (arm64's ``CONT_PTES``).

    :param row: of the VMA of each address
    """
    if not table.hugetlb_order.any():
        return constant(np.uint64(0), len(address))
    number = (address - pick(table.start, row)) >> np.uint64(table.space.layout.page_shift)
    return number & ((np.uint64(1) << pick(table.hugetlb_order, row)) - np.uint64(1))


def _changes(array: npt.NDArray[Scalar]) -> npt.NDArray[np.intp]:
    """Where another value begins than that before."""
    if is_constant(array):
        return np.zeros(0, dtype=np.intp)
    return np.flatnonzero(array[1:] != array[:-1]) + 1


@dataclass(slots=True)
class PageBatch:
    """Pages in memory that have a folio and a VMA. Arrays have one element a leaf entry."""

    layout: Layout
    table: VmaTable
    level: int
    pages: int
    """Base pages that each entry maps."""
    address: U64
    pfn: U64
    row: npt.NDArray[np.intp]
    """Row of the page's VMA in *table*."""
    folios: Folios
    present: Bool
    """False where the entry only stands for the page: one that is migrating, or that a device has."""
    rmap_items: RmapItems
    """What KSM remembers of those that it merged."""

    def expected_index(self) -> U64:
        """``linear_anon_page_index()`` of each page."""
        return self._linear(self.table.anon_pgoff)

    def expected_file_index(self) -> U64:
        """``linear_page_index()`` of each page."""
        return self._linear(self.table.vm_pgoff)

    def of_vma(self, values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """What the VMA of each page has, of an array of the table."""
        return pick(values, self.row)

    def off_chain(self, judged: Bool, anon_vma: U64, *, unfaulted: bool) -> Bool:
        """Of which pages the anon_vma is not in the chain of their VMA.

        What a damaged chain holds is not known, and AVC-SELF reports it: of its pages none.

        :param judged: the pages to look at
        :param anon_vma: one for each page of the batch
        :param unfaulted: whether to take the chain of a VMA without an anon_vma of its own for empty
        """
        rows, on = take(self.row, judged), take(anon_vma, judged)
        # Neighbours mostly agree: judge each run of the same VMA and anon_vma once.
        begins = _changes(on)
        if not is_constant(rows):
            # What is in both makes an empty run. (numpy.union1d() would import numpy.ma.)
            begins = np.sort(np.concatenate((begins, _changes(rows))))
        begins = np.concatenate(([0], begins)) if len(on) else begins
        off = self.table.off_chain(rows[begins], on[begins], unfaulted=unfaulted)
        if off.any():
            off = np.repeat(off, np.diff(begins, append=len(on)))
        else:
            off = np.zeros(len(on), dtype=bool)
        if len(off) == len(judged):
            return off
        mask = np.zeros(len(judged), dtype=bool)
        mask[judged] = off
        return mask

    def index(self) -> U64:
        """``folio->index`` plus the page's number within the folio."""
        if self.folios.head is self.pfn:
            return self.folios.index
        number = self.pfn - self.folios.head
        unit = self._unit()
        return self.folios.index + (number if unit is None else number >> unit)

    def _linear(self, pgoff: U64) -> U64:
        unit, row = self._unit(), self.row
        shift = np.uint64(self.layout.page_shift)
        if unit is None:
            # Pages since the VMA's first whole one, and its offset: what is added is the same in all of it.
            first = (self.table.start + np.uint64(self.layout.page_size - 1)) >> shift
            index = self.address >> shift
            index += pick(pgoff - first, row)
            return index
        delta = (self.address - pick(self.table.start, row)) >> shift
        return (pick(pgoff, row) >> unit) + (delta >> unit)

    def _unit(self) -> U64 | None:
        """Order of the units in which the folio of each page is indexed; None where all are base pages.

        Those of hugetlb were huge pages once (include/linux/pagemap.h: linear_page_index() before 6.7).
        """
        if self.layout.hugetlb_index_in_pages:
            return None
        return pick(self.table.hugetlb_order, self.row)


@dataclass(slots=True)
class EntryBatch(PageBatch):
    """Entries that are not present and belong to anonymous memory: of swap, or standing for a page."""

    cached: Bool
    """Entries of swap with an anonymous folio in the swap cache; only those have a page frame."""


@dataclass(frozen=True, slots=True)
class PageViolations:
    """Which pages of a batch a check objects to, with what it expected there and what it found."""

    mask: Bool
    expected: U64
    actual: U64
    legal: Bool | None = None
    """Which of them are told for information only."""

    @classmethod
    def none(cls, batch: PageBatch) -> PageViolations:
        """None of a batch."""
        return cls(np.zeros(len(batch.address), dtype=bool), batch.address, batch.address)


MmRun = Callable[[AddressSpace], Iterator[Violation]]
# A check looks at many VMAs in one go: a call for each takes longer than to look at it.
VmaViolations = Iterator[tuple[VmaContext, Violation]]
VmaRun = Callable[[Sequence[VmaContext]], VmaViolations]
PageRun = Callable[[PageBatch], PageViolations]
# Which VMAs a check may object to.
VmaGlance = Callable[[Columns], Bool]
FamilyRun = Callable[[Family], Iterator[Violation]]
# Which anon_vmas a check may object to.
FamilyGlance = Callable[[Grove], Bool]
EntryRun = Callable[[EntryBatch], PageViolations]
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])


def _always(layout: Layout) -> bool:
    """all"""
    return True


def _nowhere(table: VmaTable) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant."""

    id: str
    severity: Severity
    says: str
    """The invariant, as a sentence."""
    relied_on: str
    """Which kernel code goes wrong without it."""
    applies: Callable[[Layout], bool]
    faulting: bool = False
    """A first fault, which holds mmap_lock for read only, breaks it for a moment."""
    mm: MmRun | None = None
    vma: VmaRun | None = None
    page: PageRun | None = None
    family: FamilyRun | None = None
    vma_glance: VmaGlance | None = None
    """Which of many VMAs have to be looked at one by one (:func:`vma_check`)."""
    family_glance: FamilyGlance | None = None
    """The same of many families, by their anon_vmas."""
    entry: EntryRun | None = None
    machine: Callable[..., object] | None = None
    """For checks of a whole machine: the class that is fed with its processes."""
    message: str = ""
    """For checks on pages and entries: with {expected}, {actual}, {delta}, {pfn} and {head} to fill in."""
    alike: Callable[[int, int], int] = lambda expected, actual: 0
    """For checks on pages and entries: those of one VMA for which this is the same are one finding."""
    by_place: Callable[[VmaTable], bool] = _nowhere
    """For checks on pages: in which processes each page has to be judged by itself (:func:`page_check`)."""

    @property
    def kernels(self) -> str:
        """Which kernels must keep it, in a word or two: what *applies* says of itself."""
        return _paragraphs(self.applies)[0]

    @property
    def kernels_meaning(self) -> str:
        """Which kernels these are, if that needs to be said."""
        return " ".join(_paragraphs(self.applies)[1:])

    @property
    def run(self) -> Callable[..., object]:
        """The function that checks, of whatever kind, or the class."""
        run = self.mm or self.vma or self.page or self.entry or self.family or self.machine
        assert run is not None
        return run

    @property
    def explanation(self) -> list[str]:
        """Paragraphs for people: what the check's function says of itself below its first line."""
        return _paragraphs(self.run)[1:]


def _paragraphs(function: Callable[..., object]) -> list[str]:
    text = inspect.getdoc(function) or ""
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


CHECKS: dict[str, Check] = {}


def _registering(make: Callable[[F], Check]) -> Callable[[F], F]:
    """A decorator that registers the check that *make* makes of what is decorated."""

    def register(run: F) -> F:
        check = make(run)
        assert check.id not in CHECKS, check.id
        CHECKS[check.id] = check
        return run

    return register


def mm_check(
    id: str,
    severity: Severity,
    *,
    says: str,
    relied_on: str,
    applies: Callable[[Layout], bool] = _always,
) -> Callable[[MmRun], MmRun]:
    """Register an invariant of a whole address space."""

    return _registering(lambda run: Check(id, severity, says, relied_on, applies, mm=run))


def vma_check(
    id: str,
    severity: Severity,
    *,
    says: str,
    relied_on: str,
    applies: Callable[[Layout], bool] = _always,
    faulting: bool = False,
    glance: VmaGlance | None = None,
) -> Callable[[VmaRun], VmaRun]:
    """Register an invariant of one VMA: a function that is given many, and says which it objects to.

    :param faulting: whether the first fault in a VMA breaks it for a moment
    :param glance: tells of all VMAs of a process at once which the check has to look at: about all others it
        has nothing to say, not even for information. It may name too many. Without it each is looked at
    """

    return _registering(
        lambda run: Check(id, severity, says, relied_on, applies, faulting, vma=run, vma_glance=glance)
    )


def family_check(
    id: str,
    severity: Severity,
    *,
    says: str,
    relied_on: str,
    applies: Callable[[Layout], bool] = _always,
    glance: FamilyGlance | None = None,
) -> Callable[[FamilyRun], FamilyRun]:
    """Register an invariant of a family of anon_vmas and their trees.

    :param glance: as for :func:`vma_check`, by the anon_vmas of the families
    """

    return _registering(
        lambda run: Check(id, severity, says, relied_on, applies, family=run, family_glance=glance)
    )


def page_check(
    id: str,
    severity: Severity,
    *,
    says: str,
    relied_on: str,
    message: str,
    alike: Callable[[int, int], int],
    applies: Callable[[Layout], bool] = _always,
    by_place: Callable[[VmaTable], bool] = _nowhere,
) -> Callable[[PageRun], PageRun]:
    """Register an invariant of mapped pages.

    The check's verdict may depend on what the process's VMAs are, on the page's own (``row``), on whether the
    page is present, on what :class:`kvirt.mm.folio.Folios` tells of it, and on whether its index is as many
    above that of another page of the VMA as its address is. Many small pages that agree in all of that are
    judged by one of them (kvirt/checks/uniform.py). A check that asks for more has to say so by *by_place*.

    :param message: with {expected}, {actual}, {delta}, {pfn} and {head} to fill in
    :param alike: of (expected, actual); pages of one VMA for which it is the same are one finding
    :param by_place: of which processes it asks for more, such as the address or the page frame themselves
    """

    return _registering(
        lambda run: Check(
            *(id, severity, says, relied_on, applies),
            page=run,
            message=message,
            alike=alike,
            by_place=by_place,
        )
    )


def entry_check(
    id: str,
    severity: Severity,
    *,
    says: str,
    relied_on: str,
    message: str,
    alike: Callable[[int, int], int],
    applies: Callable[[Layout], bool] = _always,
) -> Callable[[EntryRun], EntryRun]:
    """Register an invariant of entries that are not present; the rest as for :func:`page_check`."""

    return _registering(
        lambda run: Check(id, severity, says, relied_on, applies, entry=run, message=message, alike=alike)
    )


def machine_check(
    id: str,
    severity: Severity,
    *,
    says: str,
    relied_on: str,
    applies: Callable[[Layout], bool] = _always,
) -> Callable[[type[T]], type[T]]:
    """Register an invariant that takes all processes of a machine: a class that adds them up."""

    return _registering(lambda class_: Check(id, severity, says, relied_on, applies, machine=class_))


# Whose invariants come first in lists.
_MODULES = ("vma", "chain", "tree", "file", "page", "reach", "swap", "ksm", "mapcount")


def every_check() -> list[Check]:
    """All invariants, of whatever kernel, in an order that does not depend on who imported what first."""
    for module in _MODULES:
        importlib.import_module(f"kvirt.checks.{module}")
    return sorted(CHECKS.values(), key=lambda check: _MODULES.index(check.run.__module__.split(".")[-1]))


def all_checks(layout: Layout) -> list[Check]:
    """The invariants that this kernel must keep."""
    return [check for check in every_check() if check.applies(layout)]
