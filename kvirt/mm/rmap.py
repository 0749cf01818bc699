# SPDX-License-Identifier: GPL-2.0-only
"""anon_vmas, and the chains that tie VMAs to them (include/linux/rmap.h)."""

from __future__ import annotations

from dataclasses import dataclass, field

import drgn

from kvirt.layout import RWSEM_WRITER_LOCKED, Layout
from kvirt.mm.interval_tree import RbNode, Root, decode_node, decode_root
from kvirt.mm.vma import Vma

# A chain is as long as the process is deep in forks. No kernel gets near; a damaged list may.
CHAIN_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class AnonVma:
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


@dataclass(frozen=True, slots=True)
class AnonVmaChain:
    """A ``struct anon_vma_chain`` (AVC): ties one VMA to one anon_vma."""

    address: int
    vma: int
    anon_vma: int
    same_vma_next: int
    same_vma_prev: int
    rb: RbNode = field(compare=False)
    """Its place in the tree of the anon_vma, which other processes change too."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The AVCs on ``vma->anon_vma_chain``, in order."""

    links: tuple[AnonVmaChain, ...]
    broken: str | None = None
    """Why the list could not be followed to its end, if it could not."""

    def anon_vmas(self) -> frozenset[int]:
        """Addresses of the anon_vmas in it."""
        return frozenset(link.anon_vma for link in self.links)


def read_anon_vma(prog: drgn.Program, layout: Layout, address: int) -> AnonVma:
    """Read a ``struct anon_vma`` with one read.

    :raises drgn.FaultError: if it cannot be read
    """
    data = prog.read(address, layout.anon_vma.size)
    m = layout.anon_vma.decode(data)
    count = m.get("rwsem_count")
    return AnonVma(
        address,
        m["root"],
        m["parent"],
        m["refcount"],
        decode_root(layout.anon_tree, data, layout.anon_vma.offset("rb_root")),
        m.get("num_children"),
        m.get("num_active_vmas"),
        None if count is None else bool(count & RWSEM_WRITER_LOCKED),
    )


def read_avc(prog: drgn.Program, layout: Layout, address: int) -> AnonVmaChain:
    """Read a ``struct anon_vma_chain`` with one read.

    :raises drgn.FaultError: if it cannot be read
    """
    data = prog.read(address, layout.avc.size)
    m = layout.avc.decode(data)
    return AnonVmaChain(
        address,
        m["vma"],
        m["anon_vma"],
        m["same_vma_next"],
        m["same_vma_prev"],
        decode_node(layout.anon_tree, data, layout.anon_tree.rb),
    )


def for_each_avc(prog: drgn.Program, layout: Layout, vma: Vma) -> Chain:
    """Follow ``vma->anon_vma_chain``. A damaged list ends with what was read and the reason."""
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
            link = read_avc(prog, layout, max(node - link_offset, 0))
        except drgn.FaultError:
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
