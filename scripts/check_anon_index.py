# SPDX-License-Identifier: GPL-2.0-only
"""Check the index of every anonymous folio that a process maps, in stock drgn.

    drgn -c vmcore -s vmlinux scripts/check_anon_index.py PID

A page at a time, the plain way: what ``kvirt check-pid`` does in bulk, and re-reads on a live kernel.
"""

import sys
from pathlib import Path

from drgn import get_default_prog
from drgn.helpers.linux.pid import find_task

# drgn runs a script without its tree on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvirt.lab.bench.plain import for_each_anon_page


def main() -> None:
    """Print what is wrong, and how many pages were looked at."""
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        sys.exit("Usage: drgn -c vmcore -s vmlinux scripts/check_anon_index.py PID")
    task = find_task(get_default_prog(), int(sys.argv[1]))
    if not task or not task.mm:
        sys.exit(f"There is no user process with PID {sys.argv[1]}.")
    checked = wrong = 0
    for page in for_each_anon_page(task):
        checked += 1
        if page.index != page.expected:
            wrong += 1
            print(f"{page.address:#x}: folio index {page.index:#x}, expected {page.expected:#x}")
    print(f"{checked} anonymous pages checked, {wrong} with a wrong index")
    sys.exit(1 if wrong else 0)


main()
