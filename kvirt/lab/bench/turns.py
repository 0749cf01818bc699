# SPDX-License-Identifier: GPL-2.0-only
"""Ways of doing something that are timed in turns, so that they share what else the machine does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def take_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each way takes by the clock, some rounds after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds
