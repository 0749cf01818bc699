# SPDX-License-Identifier: GPL-2.0-only
"""``python -m kvirt.lab.workload`` is ``kvirt lab workload``, without the rest of kvirt."""

import sys

from kvirt.lab.workload import main

sys.exit(main(sys.argv[1:]))
