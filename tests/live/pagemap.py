# SPDX-License-Identifier: GPL-2.0-only
"""Runs in a guest: counts the pages of processes as /proc/PID/pagemap shows them."""

import json
import sys

from kvirt.lab.procfs import PM_FILE, PM_PRESENT, read_maps, read_pagemap

counts = {}
for pid in sys.argv[1:]:
    present = anon = 0
    for mapping in read_maps(int(pid)):
        # The page of the legacy vsyscalls belongs to the kernel.
        if mapping.path == "[vsyscall]":
            continue
        for entry in read_pagemap(int(pid), mapping.start, mapping.end):
            present += bool(entry & PM_PRESENT)
            anon += entry & (PM_PRESENT | PM_FILE) == PM_PRESENT
    counts[pid] = {"present": present, "anon": anon}
print(json.dumps(counts))
