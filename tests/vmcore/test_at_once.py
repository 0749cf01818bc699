# SPDX-License-Identifier: GPL-2.0-only
"""What is read and judged for many structures at once is what comes of looking at each."""

import drgn
import pytest

from kvirt.checks.process import ProcessChecker
from kvirt.layout import layout_of
from kvirt.memory import core_of
from kvirt.mm import address_space
from kvirt.mm.structs import Unclear
from kvirt.tasks import for_each_process
from tests.vmcore.hostile import Hostile, limited

# Thousands more were run by hand.
SEEDS = range(1000, 1120)


@pytest.fixture(scope="module")
def hostile(dump):
    return Hostile(dump.open(), dump.processes().values())


def refuse(*arguments):
    raise Unclear


def found(hostile, mm):
    """All that is said of a process."""
    checker = ProcessChecker(hostile.prog, hostile.layout, moves=False)
    try:
        with limited():
            result = checker.check(mm)
    except drgn.FaultError as error:
        return str(error)
    return result.findings, result.incomplete, result.pages


def test_damage_reads_the_same_at_once_and_one_by_one(hostile, monkeypatch):
    read, at_once, wrong = address_space._read_all, 0, 0

    def counted(*arguments):
        nonlocal at_once
        read(*arguments)
        at_once += 1

    for seed in SEEDS:
        with hostile.damaged(seed) as (said, scene):
            monkeypatch.setattr(address_space, "_read_all", counted)
            together = found(hostile, scene.space.address)
            monkeypatch.setattr(address_space, "_read_all", refuse)
            each = found(hostile, scene.space.address)
        assert together == each, (seed, said)
        wrong += bool(each[0])
    # Else it would say little.
    assert at_once > len(SEEDS) // 4
    assert wrong > len(SEEDS) // 4


def test_sound_processes_are_read_at_once(hostile):
    checker = ProcessChecker(hostile.prog, hostile.layout, moves=False)
    for process in for_each_process(hostile.prog, moves=False).found:
        assert checker.read(process.mm).columns is not None, process


def test_pages_from_the_file_are_those_that_drgn_reads(dump):
    prog = dump.open().prog
    layout = layout_of(prog)
    core, base = core_of(prog), layout.page_offset
    assert base == prog["page_offset_base"].value_()
    for process in for_each_process(prog, moves=False).found:
        space = ProcessChecker(prog, layout, moves=False).read(process.mm)
        some = {*space.columns.address.tolist(), *space.columns.links.avc.tolist(), process.mm}
        for page in {address & ~4095 for address in some}:
            assert core.page((page - base) >> 12) == prog.read(page, 4096)
