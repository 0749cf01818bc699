# SPDX-License-Identifier: GPL-2.0-only
"""Words and columns of the tables: what needs no kernel."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

# In a pipe there is no terminal to ask.
WIDTH = 100
# Narrower than this a table of VMAs cannot be.
WIDTH_MIN = 80


def plural(number: int, noun: str) -> str:
    """ "1 page", "2 pages", "2 processes" """
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def terminal_width() -> int:
    """Columns to use."""
    return max(WIDTH_MIN, shutil.get_terminal_size((WIDTH, 24)).columns)


def wrap(text: str, width: int, indent: str) -> str:
    """Break a text at its blanks.

    :param indent: of all lines but the first
    """
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += " " + word
        else:
            lines.append(indent + word if lines else word)
    return "\n".join(lines)


def columns(table: Sequence[Sequence[str]], headers: Sequence[str], align: Sequence[str]) -> str:
    """A table with one blank between its columns.

    :param align: "left" or "right" of each column
    """
    # Imported here, because it takes longer than all else, and a document has no tables.
    import tabulate

    # One blank between columns: two would not leave room for names.
    style = tabulate.TableFormat(
        lineabove=None,
        linebelowheader=tabulate.Line("", "-", " ", ""),
        linebetweenrows=None,
        linebelow=None,
        headerrow=tabulate.DataRow("", " ", ""),
        datarow=tabulate.DataRow("", " ", ""),
        padding=0,
        with_header_hide=None,
    )
    # Headers get no extra width beyond their text.
    tabulate.MIN_PADDING = 0
    return tabulate.tabulate(table, headers, tablefmt=style, colalign=align, disable_numparse=True)
