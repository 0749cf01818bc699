# SPDX-License-Identifier: GPL-2.0-only
"""Dump a process's VMAs with both page offsets, in stock drgn.

    drgn -c vmcore -s vmlinux scripts/dump_vmas.py PID

The same as ``kvirt vmas``, in a few lines to start from.
"""

import sys
from pathlib import Path

from drgn import get_default_prog
from drgn.helpers.linux.mm import for_each_vma, vma_name
from drgn.helpers.linux.pid import find_task

# drgn runs a script without its tree on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvirt.mm.vma import displacement, permissions, vma_kind, vma_snapshot


def main() -> None:
    """Print one line a VMA."""
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        sys.exit("Usage: drgn -c vmcore -s vmlinux scripts/dump_vmas.py PID")
    task = find_task(get_default_prog(), int(sys.argv[1]))
    if not task or not task.mm:
        sys.exit(f"There is no user process with PID {sys.argv[1]}.")
    start_stack = task.mm.start_stack.value_()
    print(f"{'range':33} perm {'kind':12} {'vm_pgoff':>12} {'anon_pgoff':>12} {'displaced':>15} name")
    for obj in for_each_vma(task.mm):
        vma = vma_snapshot(obj)
        print(
            f"{vma.vm_start:016x}-{vma.vm_end:016x} {permissions(vma)} {vma_kind(vma, start_stack):12} "
            f"{vma.vm_pgoff:12x} {vma.anon_pgoff:12x} {displacement(vma):+15d} "
            f"{vma_name(obj).decode(errors='backslashreplace')}"
        )


main()
