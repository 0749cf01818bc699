# SPDX-License-Identifier: GPL-2.0-only
"""Limits that --help tells of, and that must not take long to import."""

# PID_MAX_LIMIT, include/linux/threads.h
PID_MAX_LIMIT = 1 << 22
# Findings, and sentences about what could not be checked, that a report keeps if not told otherwise.
MAX_FINDINGS = 1000
