# SPDX-License-Identifier: GPL-2.0-only
"""kvirt: does this kernel keep its anonymous page offsets right?"""

__version__ = "0.1.0"
