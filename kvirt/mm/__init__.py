# SPDX-License-Identifier: GPL-2.0-only
"""Reads kernel memory, under the kernel's own names. Nothing here judges."""
