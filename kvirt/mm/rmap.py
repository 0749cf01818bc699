# SPDX-License-Identifier: GPL-2.0-only
"""anon_vmas, and the chains that tie VMAs to them (include/linux/rmap.h)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import drgn

from kvirt.filtered import damage_only
from kvirt.layout import RWSEM_WRITER_LOCKED, Layout
from kvirt.mm.interval_tree import RbNode, Root, node_decoder, root_decoder
from kvirt.mm.vma import Vma, vma_reader
from kvirt.snapshot import Readable, Table

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


@dataclass(frozen=True, eq=False)
class Chain:
    """The AVCs on ``vma->anon_vma_chain``, in order."""

    links: tuple[AnonVmaChain, ...]
    broken: str | None = None
    """Why the list could not be followed to its end, if it could not."""

    def anon_vmas(self) -> frozenset[int]:
        """Addresses of the anon_vmas in it."""
        return self._anon_vmas

    @cached_property
    def _anon_vmas(self) -> frozenset[int]:
        return frozenset([link.anon_vma for link in self.links])

    def __eq__(self, other: object) -> bool:
        """Whether both are the same list; the places of its AVCs in their trees do not count."""
        return (
            isinstance(other, Chain)
            and self.broken == other.broken
            and [link[:-1] for link in self.links] == [link[:-1] for link in other.links]
        )


_AVC = ("vma", "anon_vma", "same_vma_next", "same_vma_prev")
_ANON_VMA = ("root", "parent", "refcount")
_OPTIONAL = ("num_children", "num_active_vmas", "rwsem_count")


def anon_vma_reader(memory: Readable, layout: Layout) -> Callable[[int], AnonVma]:
    """A function that reads the anon_vma at an address, with one read.

    It raises :class:`drgn.FaultError` if the ``struct anon_vma`` cannot be read.
    """
    how, decode_root = layout.anon_vma, root_decoder(layout.anon_tree)
    optional = tuple(name for name in _OPTIONAL if name in how)
    get, at = how.getter((*_ANON_VMA, *optional)), how.offset("rb_root")

    def read(address: int) -> AnonVma:
        data = memory.read(address, how.size)
        root, parent, refcount, *more = get(data)
        counts = dict(zip(optional, more, strict=True))
        count = counts.get("rwsem_count")
        return AnonVma(
            address,
            root,
            parent,
            refcount,
            decode_root(data, at),
            counts.get("num_children"),
            counts.get("num_active_vmas"),
            None if count is None else bool(count & RWSEM_WRITER_LOCKED),
        )

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

    def __init__(self, memory: Readable, layout: Layout, known: Records | None = None) -> None:
        """Prepare.

        :param known: what was read already and is to be taken as it was
        """
        self.memory = memory
        self.vmas: Table[Vma] = Table(vma_reader(memory, layout), known.vmas if known else None)
        self.avcs: Table[AnonVmaChain] = Table(avc_reader(memory, layout), known.avcs if known else None)
        self.anon_vmas: Table[AnonVma] = Table(
            anon_vma_reader(memory, layout), known.anon_vmas if known else None
        )
        # By what it needs, and not by a method: nothing here is to be left for the collector of cycles.
        vmas, avcs = self.vmas, self.avcs
        self.chains: Table[Chain] = Table(
            lambda vma: for_each_avc(avcs, layout, vmas[vma]), known.chains if known else None
        )
        """Chain of each VMA, by the VMA's address."""


def for_each_avc(avcs: Mapping[int, AnonVmaChain], layout: Layout, vma: Vma) -> Chain:
    """Follow ``vma->anon_vma_chain``. A damaged list ends with what was read and the reason.

    :param avcs: from :class:`Records`
    :raises drgn.FaultError: if a part of it was left out of the dump
    """
    head = vma.address + layout.vma.offset("chain_next")
    link_offset = layout.avc.offset("same_vma_next")
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
            link = avcs[max(node - link_offset, 0)]
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
