# SPDX-License-Identifier: GPL-2.0-only
"""Pages that were left out of a dump on purpose, and how they are told from damage.

makedumpfile leaves out what its dump level says: zeros, page cache, user data, free pages. kvirt needs none
of these. But a makedumpfile that is older than the kernel takes some of the kernel's own memory for such, and
a list that leads there is not broken.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import drgn

from kvirt.elfcore import PT_LOAD, read_elf_core
from kvirt.errors import FilteredError
from kvirt.kdump import EXCLUDED, read_kdump

_CACHE_KEY = "kvirt.filtered"
# makedumpfile's level for all zeros and nothing else.
_ZEROS = 1


@dataclass(frozen=True)
class Filtering:
    """What was left out of a dump."""

    level: int | None
    """makedumpfile's dump level; None if the file does not say it."""
    gaps: bool
    """Whether it is an ELF dump that lacks some of the memory that it describes."""


def mark_filtered(prog: drgn.Program, path: Path) -> None:
    """Learn what was left out of a core; what an ELF core lacks becomes a fault to read, as in other cores.

    makedumpfile -E makes segments that are larger in memory than in the file, be it for zeros or for what its
    dump level says, and drgn would read zeros there.

    :param path: what *prog* was opened with
    """
    if not path.is_file():
        return
    kdump = read_kdump(path)
    level = None if kdump is None else kdump.level
    elf = read_elf_core(path)
    loads = elf.headers if elf is not None else ()
    gaps = [load for load in loads if load.type == PT_LOAD and load.memory > load.size]
    for load in gaps:
        size = load.memory - load.size
        prog.add_memory_segment(load.physical + load.size, size, _refuse, physical=True)
        # /proc/vmcore says where the kernel has it, and drgn reads it by that.
        if load.virtual >> 63:
            prog.add_memory_segment(load.virtual + load.size, size, _refuse)
    prog.cache[_CACHE_KEY] = Filtering(level, bool(gaps))


def _refuse(address: int, count: int, offset: int, physical: bool) -> bytes:
    raise drgn.FaultError(EXCLUDED, address)


def is_filtered(fault: object) -> bool:
    """Whether a fault, or a sentence that quotes one, is about a page that was left out of the dump."""
    return EXCLUDED in str(fault)


def damage_only(fault: Exception) -> None:
    """Raise a fault again if it is about a page that was left out: nothing is wrong with what leads there.

    :param fault: what was caught; others than :class:`drgn.FaultError` are let pass
    """
    if is_filtered(fault):
        raise fault


def why_filtered(prog: drgn.Program, sentences: Iterable[str]) -> str | None:
    """The sentence that says why pages are missing from a dump; None if there is no reason to say it.

    :param sentences: what could not be checked
    """
    sentences = list(sentences)
    filtering = prog.cache.get(_CACHE_KEY)
    if not isinstance(filtering, Filtering) or not sentences:
        return None
    more = filtering.gaps or (filtering.level or 0) > _ZEROS
    if not more and not any(map(is_filtered, sentences)):
        return None
    if filtering.gaps:
        return (
            "This ELF dump was filtered, and lacks pages that kvirt needs, which is no damage: it leaves out "
            "zeros, and does not tell them from the kernel's memory that a makedumpfile older than the "
            "kernel takes for user data or free; save the dump kdump-compressed (makedumpfile -d 1, without "
            "-E)."
        )
    return (
        f"This dump was filtered (makedumpfile's dump level {filtering.level}), and lacks pages that kvirt "
        "needs, which is no damage: a makedumpfile that is older than the kernel takes some of the kernel's "
        "memory for user data or free; save the dump with `makedumpfile -d 1`, which leaves out zeros alone, "
        "or with a makedumpfile that knows this kernel."
    )


def filtered_error(prog: drgn.Program, what: str, fault: drgn.FaultError) -> FilteredError:
    """The error for what cannot be done, because something was left out of the dump.

    :param what: a sentence without its dot
    """
    said = f"{what}, because the dump lacks pages on the way to it ({fault})."
    why = why_filtered(prog, [said])
    return FilteredError(said if why is None else f"{said} {why}")
