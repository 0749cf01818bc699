# SPDX-License-Identifier: GPL-2.0-only
"""The invariants. One invariant is one function, registered by a decorator of ``registry``."""
