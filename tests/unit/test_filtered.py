# SPDX-License-Identifier: GPL-2.0-only
"""What was left out of a dump is told from damage. Real dumps are filtered in tests/vmcore and tests/live."""

import struct

import drgn
import pytest

from kvirt.cli import main
from kvirt.elfcore import PT_LOAD
from kvirt.errors import FilteredError, KvirtError
from kvirt.filtered import (
    damage_only,
    filtered_error,
    is_filtered,
    mark_filtered,
    why_filtered,
)
from kvirt.findings import Report
from tests.unit.fake import Memory
from tests.unit.test_kdump import kdump

# What libkdumpfile says, in drgn's words.
EXCLUDED = drgn.FaultError("could not read memory from kdump: Excluded page", 0xFFFF888000001000)
DAMAGE = drgn.FaultError("could not find memory segment", 0xDEAD)


def opened(tmp_path, content):
    """A program that has been opened with a core, as far as that matters here."""
    path = tmp_path / "vmcore"
    path.write_bytes(content)
    prog = Memory().prog
    mark_filtered(prog, path)
    return prog


def elf(*loads):
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(loads), 0, 0, 0)
    return header + b"".join(
        struct.pack("<IIQQQQQQ", PT_LOAD, 0, 0x1000, virtual, physical, size, memory, 0)
        for virtual, physical, size, memory in loads
    )


def test_gaps_of_an_elf_core_are_no_zeros(tmp_path):
    virtual = 0xFFFF888000100000
    prog = opened(tmp_path, elf((virtual, 0x100000, 0x1000, 0x3000), (0, 0x200000, 0x1000, 0x1000)))
    for address, physical in ((0x101000, True), (0x102FF8, True), (virtual + 0x1000, False)):
        with pytest.raises(drgn.FaultError) as caught:
            prog.read(address, 8, physical)
        assert is_filtered(caught.value)
    for address, physical in ((0x100000, True), (0x103000, True), (0x201000, True), (virtual, False)):
        with pytest.raises(drgn.FaultError) as caught:
            prog.read(address, 8, physical)
        assert not is_filtered(caught.value)
    why = why_filtered(prog, ["Something is missing."])
    assert "This ELF dump was filtered" in why
    assert "without -E" in why


def test_a_filtered_kdump_explains_what_could_not_be_checked(tmp_path):
    prog = opened(tmp_path, kdump(31))
    assert why_filtered(prog, []) is None
    why = why_filtered(prog, ["Something is missing."])
    assert "makedumpfile's dump level 31" in why
    assert "no damage" in why
    assert "`makedumpfile -d 1`" in why


@pytest.mark.parametrize("content", [kdump(1), elf((0, 0x100000, 0x1000, 0x1000))])
def test_whole_dumps_blame_the_filter_only_if_it_was_met(tmp_path, content):
    prog = opened(tmp_path, content)
    assert why_filtered(prog, ["Something is missing.", f"({DAMAGE})"]) is None
    assert "This dump was filtered" in why_filtered(prog, [f"This cannot be read ({EXCLUDED})."])


def test_a_running_kernel_is_not_filtered():
    assert why_filtered(Memory().prog, ["Something is missing."]) is None


def test_damage_and_what_is_none():
    damage_only(DAMAGE)
    damage_only(OverflowError("too large"))
    with pytest.raises(drgn.FaultError) as caught:
        damage_only(EXCLUDED)
    assert caught.value is EXCLUDED


def test_what_cannot_be_done_without_the_missing_pages(tmp_path):
    error = filtered_error(opened(tmp_path, kdump(31)), "PID 5 cannot be looked up", EXCLUDED)
    assert isinstance(error, FilteredError)
    assert error.status == 3
    said = str(error)
    assert said.startswith("PID 5 cannot be looked up, because the dump lacks pages on the way to it (")
    assert said.endswith("with a makedumpfile that knows this kernel.")


def test_the_reason_comes_first_and_always_finds_room():
    report = Report(max_findings=1)
    report.note_incomplete("This is missing.")
    report.note_incomplete("That is missing.")
    report.note_incomplete("The dump was filtered.", first=True)
    assert report.incomplete == ["The dump was filtered.", "This is missing."]
    assert report.incomplete_count == 3
    assert report.exit_status() == 3


@pytest.mark.parametrize(("error", "status"), [(KvirtError, 2), (FilteredError, 3)])
def test_the_program_tells_what_is_missing_from_what_is_wrong(monkeypatch, capsys, error, status):
    def refuse(**options):
        raise error("It cannot be read.")

    monkeypatch.setattr("kvirt.cli.cli", refuse)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == status
    assert capsys.readouterr().err == "kvirt: It cannot be read.\n"
