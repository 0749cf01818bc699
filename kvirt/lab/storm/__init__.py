# SPDX-License-Identifier: GPL-2.0-only
"""Changes memory in every way that page offsets depend on, on all processors and at random.

The workload's states stand still and are known to the page; the storm's are never the same twice, and
nobody vouches for them. What it is good for: whoever checks a machine meanwhile must find no error.

* ``arena``: where one process does it: slots of addresses, and what lies in them.
* ``operations``: what is done there, one small function each, with how often it is drawn.
* ``processes``: who does it: workers that fork and exec, and the account of what was done.
* ``machine``: swap, KSM, compaction and khugepaged, with the kernel's own counters.
* ``program``: the command line.
* ``watch``: checks the whole machine again and again meanwhile.
"""
