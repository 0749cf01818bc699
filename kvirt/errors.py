# SPDX-License-Identifier: GPL-2.0-only
"""What kvirt raises when it cannot do what was asked."""


class KvirtError(Exception):
    """Wrong usage or environment: one sentence that says what is wrong and what to do next.

    The command line prints it on stderr and exits with status 2.
    """
