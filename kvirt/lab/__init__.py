# SPDX-License-Identifier: GPL-2.0-only
"""The test machine: kernel packages, a guest root, QEMU guests and their dumps."""
