# SPDX-License-Identifier: GPL-2.0-only
"""How often a running kernel is read again before it is accused, and how long kvirt waits for it."""

REREADS = 2
"""Times that what looks wrong is read again."""
PAUSE = 0.012
"""Seconds before each time."""
TRIES = 8
"""Attempts for each time, until nobody changes what is read meanwhile."""
LEFT = 0.05
"""Seconds after which entries of small VMAs are not kept any longer, to be judged with those of others."""
