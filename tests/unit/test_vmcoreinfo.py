# SPDX-License-Identifier: GPL-2.0-only
from types import SimpleNamespace

import drgn
import pytest

from kvirt.finders import _vmemmap
from kvirt.vmcoreinfo import vmcoreinfo_number
from tests.unit.fake import Memory

TEXT = b"""OSRELEASE=7.3.0
PAGESIZE=4096
NUMBER(VA_BITS)=52
NUMBER(VMEMMAP_START)=0xffffc1ffc0000000
NUMBER(PHYS_OFFSET)=0x%x
NUMBER(odd)=-1
"""


def info(offset=0):
    return {"VMCOREINFO": SimpleNamespace(string_=lambda: TEXT % offset)}


@pytest.mark.parametrize(
    ("name", "number"),
    [("VA_BITS", 52), ("VMEMMAP_START", 0xFFFFC1FFC0000000), ("odd", -1), ("PAGESIZE", None), ("VA", None)],
)
def test_numbers(name, number):
    assert vmcoreinfo_number(info(), name) == number


@pytest.mark.parametrize(
    ("offset", "vmemmap"),
    # The memory begins at 1 GiB; and below 0, as seen by a kernel for more bits than the processor has.
    [(0x40000000, 0xFFFFC1FFBF000000), ((1 << 64) - 0x40000000, 0xFFFFC1FFC1000000)],
)
def test_where_struct_pages_are_on_arm64(monkeypatch, offset, vmemmap):
    memory = Memory()
    prog = memory.prog
    page = prog.struct_type("page", 64, ())
    monkeypatch.setattr(
        "kvirt.finders.vmcoreinfo_number", lambda _, name: vmcoreinfo_number(info(offset), name)
    )
    prog.register_type_finder("page", lambda prog, kinds, name, file: page, enable_index=0)
    shift = drgn.Object(prog, prog.int_type("int", 4, True), 12)
    prog.register_object_finder(
        "shift", lambda prog, name, flags, file: shift if name == "PAGE_SHIFT" else None, enable_index=0
    )
    assert _vmemmap(prog).value_() == vmemmap
