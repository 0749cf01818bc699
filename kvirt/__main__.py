# SPDX-License-Identifier: GPL-2.0-only
"""``python -m kvirt`` is the program ``kvirt``."""

from kvirt.cli import main

if __name__ == "__main__":
    main()
