# SPDX-License-Identifier: GPL-2.0-only
"""A program whose memory has every state that a page offset can be in, with the offsets predicted.

It prints one line of JSON (schema ``kvirt.workload/1``) once everything stands, holds it until its
stdin ends or SIGTERM comes, then ends its children and exits with 0. Before it prints, it compares
what it vouches for with /proc: a state that was not reached is a sentence on stderr and exit
status 1.

It runs in small and slow guests: nothing here imports more than the standard library.
"""

from kvirt.lab.workload.program import main

__all__ = ["main"]
