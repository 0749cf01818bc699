# SPDX-License-Identifier: GPL-2.0-only
"""What ``make bench`` runs in guests: workloads to be traced, and other people's ways of tracing."""
