# SPDX-License-Identifier: GPL-2.0-only
"""Where this kvirt runs from."""

from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
"""The directory that has the package ``kvirt`` in it."""
