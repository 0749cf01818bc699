# SPDX-License-Identifier: GPL-2.0-only
"""``python3 -m kvirt.lab.storm``."""

import sys

from kvirt.lab.storm.program import main

sys.exit(main(sys.argv[1:]))
