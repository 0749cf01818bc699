# SPDX-License-Identifier: GPL-2.0-only
"""Check the index of every anonymous folio that a process maps, in stock drgn.

    drgn -c vmcore -s vmlinux scripts/check_anon_index.py PID

A page at a time, the plain way: what ``kvirt check-pid`` does in bulk, and re-reads on a live kernel.
"""

import sys
from pathlib import Path

from drgn import FaultError, cast, get_default_prog
from drgn.helpers.linux.mm import compound_head, follow_page, for_each_vma, page_index
from drgn.helpers.linux.pid import find_task

# drgn runs a script without its tree on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvirt.mm.vma import linear_anon_page_index, vma_is_temporary_stack, vma_snapshot


def main() -> None:
    """Print what is wrong, and how many pages were looked at."""
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        sys.exit("Usage: drgn -c vmcore -s vmlinux scripts/check_anon_index.py PID")
    task = find_task(get_default_prog(), int(sys.argv[1]))
    if not task or not task.mm:
        sys.exit(f"There is no user process with PID {sys.argv[1]}.")
    checked = wrong = 0
    for obj in for_each_vma(task.mm):
        vma = vma_snapshot(obj)
        # A VMA without anon_vma has no anonymous folios, and an exec moves its stack with old indexes.
        if not vma.anon_vma or vma_is_temporary_stack(vma):
            continue
        for address in range(vma.vm_start, vma.vm_end, 1 << vma.layout.page_shift):
            try:
                page = follow_page(task.mm, address)
            except (LookupError, FaultError):
                continue
            head = compound_head(page)
            # FOLIO_MAPPING_ANON without FOLIO_MAPPING_KSM
            if cast("unsigned long", head.mapping).value_() & 3 != 1:
                continue
            checked += 1
            index = page_index(head).value_() + (page - head).value_()
            expected = linear_anon_page_index(vma, address)
            if index != expected:
                wrong += 1
                print(f"{address:#x}: folio index {index:#x}, expected {expected:#x}")
    print(f"{checked} anonymous pages checked, {wrong} with a wrong index")
    sys.exit(1 if wrong else 0)


main()
