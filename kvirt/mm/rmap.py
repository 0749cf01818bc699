# SPDX-License-Identifier: GPL-2.0-only
"""anon_vmas, and the chains that tie VMAs to them (include/linux/rmap.h)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import drgn

from kvirt.filtered import damage_only
from kvirt.layout import RWSEM_WRITER_LOCKED, Layout
from kvirt.mm.interval_tree import RbNode, Root, node_decoder, root_decoder
from kvirt.mm.vma import Vma, vma_reader
from kvirt.snapshot import Readable, Snapshot, Table

# A chain is as long as the process is deep in forks. No kernel gets near; a damaged list may.
CHAIN_MAX = 1 << 16


class AnonVma(NamedTuple):
    """A ``struct anon_vma`` as it was in one read."""

    address: int
    root: int
    parent: int
    refcount: int
    tree: Root
    num_children: int | None
    num_active_vmas: int | None
    write_locked: bool | None
    """Whether somebody held its rwsem for write; None where the kernel does not tell."""


class AnonVmaChain(NamedTuple):
    """A ``struct anon_vma_chain`` (AVC): ties one VMA to one anon_vma."""

    address: int
    vma: int
    anon_vma: int
    same_vma_next: int
    same_vma_prev: int
    rb: RbNode
    """Its place in the tree of the anon_vma, which other processes change too."""


class Chain:
    """The AVCs on ``vma->anon_vma_chain``, in order. Not to be changed."""

    __slots__ = ("_anon_vmas", "broken", "links")

    def __init__(self, links: tuple[AnonVmaChain, ...], broken: str | None = None) -> None:
        """Take what was read.

        :param broken: why the list could not be followed to its end, if it could not
        """
        self.links = links
        self.broken = broken
        self._anon_vmas = frozenset([link.anon_vma for link in links])

    def anon_vmas(self) -> frozenset[int]:
        """Addresses of the anon_vmas in it."""
        return self._anon_vmas

    def __eq__(self, other: object) -> bool:
        """Whether both are the same list; the places of its AVCs in their trees do not count."""
        return (
            isinstance(other, Chain)
            and self.broken == other.broken
            and [link[:-1] for link in self.links] == [link[:-1] for link in other.links]
        )


# What VMAs without anon_vma have. Most of those that map files are such.
_EMPTY = Chain(())

_AVC = ("vma", "anon_vma", "same_vma_next", "same_vma_prev")
_ANON_VMA = ("root", "parent", "refcount")
_OPTIONAL = ("num_children", "num_active_vmas", "rwsem_count")


def anon_vma_reader(memory: Readable, layout: Layout) -> Callable[[int], AnonVma]:
    """A function that reads the anon_vma at an address, with one read.

    It raises :class:`drgn.FaultError` if the ``struct anon_vma`` cannot be read.
    """
    how, decode_root = layout.anon_vma, root_decoder(layout.anon_tree)
    optional = tuple(name for name in _OPTIONAL if name in how)
    get, size, at = how.getter((*_ANON_VMA, *optional)), how.size, how.offset("rb_root")
    complete = optional == _OPTIONAL

    def read(address: int) -> AnonVma:
        data = memory.read(address, size)
        root, parent, refcount, *more = get(data)
        children: int | None
        active: int | None
        count: int | None
        if complete:
            children, active, count = more
        else:
            counts = dict(zip(optional, more, strict=True))
            children, active, count = map(counts.get, _OPTIONAL)
        locked = None if count is None else count & RWSEM_WRITER_LOCKED != 0
        return AnonVma(address, root, parent, refcount, decode_root(data, at), children, active, locked)

    return read


def avc_reader(memory: Readable, layout: Layout) -> Callable[[int], AnonVmaChain]:
    """A function that reads the AVC at an address, with one read.

    It raises :class:`drgn.FaultError` if the ``struct anon_vma_chain`` cannot be read.
    """
    size, get = layout.avc.size, layout.avc.getter(_AVC)
    decode_node, rb = node_decoder(layout.anon_tree), layout.anon_tree.rb

    def read(address: int) -> AnonVmaChain:
        data = memory.read(address, size)
        return AnonVmaChain._make((address, *get(data), decode_node(data, rb)))

    return read


class Records:
    """VMAs, AVCs and anon_vmas in some memory, each read once, whatever leads to it.

    Looking one up raises :class:`drgn.FaultError` if it cannot be read.
    """

    def __init__(self, memory: Snapshot, layout: Layout) -> None:
        self.memory = memory
        self.vmas: Table[Vma] = Table(vma_reader(memory, layout))
        self.avcs: Table[AnonVmaChain] = Table(avc_reader(memory, layout))
        self.anon_vmas: Table[AnonVma] = Table(anon_vma_reader(memory, layout))
        # By what it needs, and not by a method: nothing here is to be left for the collector of cycles.
        vmas, follow = self.vmas, chain_reader(self.avcs, layout)
        self.chains: Table[Chain] = Table(lambda vma: follow(vmas[vma]))
        """Chain of each VMA, by the VMA's address."""
        self._tables: tuple[Table[Any], ...] = self.vmas, self.avcs, self.anon_vmas, self.chains

    def mark(self) -> list[int]:
        """How much there is now, for :meth:`release`."""
        return [len(table) for table in self._tables]

    def release(self, mark: list[int]) -> None:
        """Drop what was read since."""
        for table, size in zip(self._tables, mark, strict=True):
            while len(table) > size:
                # The latest.
                table.popitem()


def chain_reader(avcs: Mapping[int, AnonVmaChain], layout: Layout) -> Callable[[Vma], Chain]:
    """A function that follows ``vma->anon_vma_chain``. A damaged list ends with what was read and the reason.

    It raises :class:`drgn.FaultError` if a part of the list was left out of the dump.

    :param avcs: from :class:`Records`
    """
    head_offset = layout.vma.offset("chain_next")
    link_offset = layout.avc.offset("same_vma_next")

    def follow(vma: Vma) -> Chain:
        head = vma.address + head_offset
        if vma.chain_next == head == vma.chain_prev:
            return _EMPTY
        links: list[AnonVmaChain] = []
        seen: set[int] = set()
        previous, node = head, vma.chain_next
        while node != head:
            if node in seen:
                return Chain(tuple(links), f"the chain comes back to {node - link_offset:#x}")
            if len(links) >= CHAIN_MAX:
                return Chain(tuple(links), f"the chain has more than {CHAIN_MAX} links")
            seen.add(node)
            try:
                link = avcs[node - link_offset if node > link_offset else 0]
            except drgn.FaultError as error:
                damage_only(error)
                return Chain(tuple(links), f"the chain leads to {node:#x}, which cannot be read")
            if link.same_vma_prev != previous:
                # Not a link of this list: either damage, or memory that was freed meanwhile.
                return Chain(
                    tuple(links),
                    f"the link at {link.address:#x} points back to {link.same_vma_prev:#x} "
                    f"instead of {previous:#x}",
                )
            links.append(link)
            previous, node = node, link.same_vma_next
        if vma.chain_prev != previous:
            return Chain(
                tuple(links),
                f"the chain's last link should be {previous:#x} and is {vma.chain_prev:#x}",
            )
        return Chain(tuple(links))

    return follow
