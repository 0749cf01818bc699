# SPDX-License-Identifier: GPL-2.0-only
"""What kvirt raises when it cannot do what was asked, and how strangers' words go into its sentences."""


class KvirtError(Exception):
    """Wrong usage or environment: one sentence that says what is wrong and what to do next.

    The command line prints it on stderr and exits with :attr:`status`.
    """

    status = 2


class FilteredError(KvirtError):
    """What was asked for was left out of the dump: nothing is known of it, and nothing is wrong with it."""

    status = 3


def printable(text: str, keep: str = "") -> str:
    """Show control and escape characters escaped: names come from other people's processes.

    :param keep: characters to leave as they are
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text
    )
