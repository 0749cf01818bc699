# SPDX-License-Identifier: GPL-2.0-only
"""``python -m kvirt`` is the program ``kvirt``; as a command it begins here too."""

import sys


def main() -> None:
    """Run the program. Importing it takes a while on a slow machine: Ctrl-C is heard from here on."""
    try:
        from kvirt.cli import main

        main()
    except KeyboardInterrupt:
        from signal import SIGINT

        print("kvirt: interrupted, and nothing is known of what was not printed.", file=sys.stderr)
        sys.exit(128 + SIGINT)


if __name__ == "__main__":
    main()
