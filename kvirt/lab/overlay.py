# SPDX-License-Identifier: GPL-2.0-only
"""Reads a dump as if some of its memory were different. The dump itself is not changed.

    >>> overlay = Overlay(prog)
    >>> overlay.set(vma.anon_vma, 0)

makes everything that is read through *prog* from then on see ``vma->anon_vma == NULL``: a way to see
what a check says of a state that no healthy kernel would ever show.
"""

from __future__ import annotations

import drgn
from drgn.helpers.linux.mm import follow_phys

from kvirt.errors import KvirtError
from kvirt.memory import core_of


class Overlay:
    """Differences laid over the memory of one program."""

    def __init__(self, prog: drgn.Program) -> None:
        """Prepare.

        :raises KvirtError: if the program's kernel runs: what it does next cannot be made up
        """
        if prog.flags & drgn.ProgramFlags.IS_LIVE:
            raise KvirtError("An overlay needs a kernel that stands still: name a vmcore with --core.")
        self._prog = prog
        self._before: list[tuple[int, bytes, bool]] = []

    def write(self, address: int, data: bytes) -> None:
        """Read *data* at a kernel virtual address, and at the physical one behind it.

        :raises drgn.FaultError: if nothing is mapped at *address*
        """
        # Reading through page tables and reading physical memory must agree, however the page is met.
        physical = follow_phys(self._prog["init_mm"].address_of_(), address).value_()
        self._segment(address, data, physical=False)
        self._segment(physical, data, physical=True)

    def write_physical(self, address: int, data: bytes) -> None:
        """Read *data* at a physical address; for what is only ever read so, as page tables are."""
        self._segment(address, data, physical=True)

    def set(self, member: drgn.Object, value: int) -> None:
        """Read *member*, a reference to an integer or pointer in memory, as *value*."""
        if member.address_ is None:
            raise ValueError("only what lies in memory can be overlaid")
        size = drgn.sizeof(member)
        self.write(member.address_, (value & ((1 << 8 * size) - 1)).to_bytes(size, "little"))

    def undo(self) -> None:
        """Read everything as it was before the first difference."""
        while self._before:
            self._lay(*self._before.pop())

    def _segment(self, address: int, data: bytes, *, physical: bool) -> None:
        self._before.append((address, self._prog.read(address, len(data), physical), physical))
        self._lay(address, data, physical)

    def _lay(self, address: int, data: bytes, physical: bool) -> None:
        core = core_of(self._prog)
        if core is not None and physical:
            core.hide(address, len(data))

        # The newest segment hides what it covers of others.
        def read(at: int, count: int, offset: int, is_physical: bool) -> bytes:
            return data[offset : offset + count]

        self._prog.add_memory_segment(address, len(data), read, physical)
