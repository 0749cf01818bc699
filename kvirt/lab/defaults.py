# SPDX-License-Identifier: GPL-2.0-only
"""What the command line offers unless told otherwise; free of imports, so that ``--help`` is quick."""

KERNEL = "7.3"
# Whose user space guests have.
SUITE = "trixie"
# drgn needs about 1.5 GB for the debug information of a whole kernel.
MEMORY = "2560M"
CPUS = 2
# Seconds a guest may live.
TIMEOUT = 600.0
# In QEMU's words; the kdump ones come flattened.
DUMP_FORMATS = ("elf", "kdump-zlib", "kdump-lzo", "kdump-snappy")
# What crashed guests are saved with, and makedumpfile's options for it; Debian's has no snappy.
COMPRESSIONS = {"zlib": "c", "lzo": "l", "zstd": "z"}
DUMP_LEVELS = (31, 1)
