# SPDX-License-Identifier: GPL-2.0-only
"""The plain ways: the index of anonymous folios a page at a time, VMAs and their chains one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import drgn
from drgn.helpers.linux.list import list_for_each
from drgn.helpers.linux.mm import compound_head, follow_page, for_each_vma, page_index

from kvirt.mm.vma import linear_anon_page_index, vma_is_temporary_stack, vma_snapshot


@dataclass(frozen=True, slots=True)
class AnonPage:
    """One anonymous page, and what index it should have."""

    address: int
    index: int
    expected: int


def for_each_anon_page(task: drgn.Object) -> Iterator[AnonPage]:
    """Go through the anonymous pages that a process maps.

    :param task: ``struct task_struct *``
    """
    for obj in for_each_vma(task.mm):
        vma = vma_snapshot(obj)
        # A VMA without anon_vma has no anonymous folios, and an exec moves its stack with old indexes.
        if not vma.anon_vma or vma_is_temporary_stack(vma):
            continue
        for address in range(vma.vm_start, vma.vm_end, 1 << vma.layout.page_shift):
            try:
                page = follow_page(task.mm, address)
            except (LookupError, drgn.FaultError):
                continue
            head = compound_head(page)
            # FOLIO_MAPPING_ANON without FOLIO_MAPPING_KSM
            if drgn.cast("unsigned long", head.mapping).value_() & 3 != 1:
                continue
            index = page_index(head).value_() + (page - head).value_()
            yield AnonPage(address, index, linear_anon_page_index(vma, address))


def count_wrong(task: drgn.Object, most: int | None = None) -> tuple[int, int]:
    """Anonymous pages looked at, and how many of them have a wrong index.

    :param most: pages to look at
    """
    checked = wrong = 0
    for page in islice(for_each_anon_page(task), most):
        checked += 1
        wrong += page.index != page.expected
    return checked, wrong


def count_lists(tasks: list[drgn.Object]) -> tuple[int, int]:
    """VMAs of some processes, and anon_vma_chains of these.

    :param tasks: ``struct task_struct *`` each
    """
    vmas = avcs = 0
    for task in tasks:
        for vma in for_each_vma(task.mm):
            vmas += 1
            avcs += sum(1 for _ in list_for_each(vma.anon_vma_chain.address_of_()))
    return vmas, avcs
