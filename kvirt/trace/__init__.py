# SPDX-License-Identifier: GPL-2.0-only
"""Counters in the running kernel: how often the fast path would hit, and whether offsets stay right."""
