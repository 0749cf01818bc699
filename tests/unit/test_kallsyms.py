# SPDX-License-Identifier: GPL-2.0-only
"""A table of symbols packed by hand; those of real kernels are compared with drgn's in tests/vmcore."""

import struct

import drgn
import pytest

from kvirt.kallsyms import Kallsyms

BASE = 0xFFFFFFFF81000000
COUNT, NAMES, TABLE, INDEX, OFFSETS, RELATIVE = (BASE + 0x10000 * i for i in range(6))
LONG = "l" * 200
SYMBOLS = [
    (BASE, "T_stext"),
    (BASE + 0x10, "tcopy"),
    (BASE + 0x20, "Tcopy_vma"),
    (BASE + 0x20, "Tpocy_vma"),
    (BASE + 0x30, "dcopy"),
    (BASE + 0x50, "D" + LONG),
]


def packed(name):
    """Two codes stand for more than one character; a name of more than 127 codes has two bytes of length."""
    codes = name.encode().replace(b"copy", b"\x01").replace(b"_vma", b"\x02")
    return bytes([len(codes)] if len(codes) < 128 else [len(codes) & 0x7F | 0x80, len(codes) >> 7]) + codes


def offsets(way):
    places = [address - BASE for address, _ in SYMBOLS]
    if way == "absolute percpu":
        return [-1 - place for place in places]
    if way == "place-relative":
        return [BASE + place - (OFFSETS + 4 * i) for i, place in enumerate(places)]
    return places


def program(way="relative", names=None, stext=BASE):
    table, index = b"", []
    for code in range(256):
        index.append(len(table))
        table += {1: b"copy", 2: b"_vma"}.get(code, bytes([code]) if code else b"") + b"\0"
    if names is None:
        names = b"".join(packed(name) for _, name in SYMBOLS)
    parts = {
        NAMES: names.ljust(TABLE - NAMES, b"\0"),
        COUNT: struct.pack("<I", len(SYMBOLS)),
        TABLE: table + bytes(256),
        INDEX: struct.pack("<256H", *index),
        OFFSETS: struct.pack(f"<{len(SYMBOLS)}i", *offsets(way)),
        RELATIVE: struct.pack("<Q", BASE),
    }
    prog = drgn.Program(drgn.host_platform)
    for address, data in parts.items():
        prog.add_memory_segment(address, len(data), lambda at, n, o, physical, data=data: data[o : o + n])
    told = {"names": NAMES, "num_syms": COUNT, "token_table": TABLE, "token_index": INDEX, "offsets": OFFSETS}
    if way != "place-relative":
        told["relative_base"] = RELATIVE
    text = "".join(f"SYMBOL(kallsyms_{name})={at:x}\n" for name, at in told.items())
    data = (text + f"SYMBOL(_stext)={stext:x}\n").encode()
    info = drgn.Object(prog, prog.array_type(prog.int_type("char", 1, True), len(data)), data)
    prog.register_object_finder(
        "made up", lambda prog, name, flags, file: info if name == "VMCOREINFO" else None, enable_index=0
    )
    return prog


@pytest.mark.parametrize("way", ["relative", "absolute percpu", "place-relative"])
def test_symbols_are_found_by_name(way):
    table = Kallsyms(program(way))
    assert [s.address - BASE for s in table.find("copy")] == [0x10, 0x30]
    (vma,) = table.find("copy_vma")
    assert (vma.address - BASE, vma.size, vma.binding, vma.kind) == (
        0x20,
        0x10,
        drgn.SymbolBinding.GLOBAL,
        drgn.SymbolKind.FUNC,
    )
    (last,) = table.find(LONG)
    assert (last.address - BASE, last.size, last.kind) == (0x50, 0, drgn.SymbolKind.OBJECT)
    # The same characters in another order, and none at all.
    assert [s.name for s in table.find("pocy_vma")] == ["pocy_vma"]
    assert [*table.find("vma"), *table.find("")] == []


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (lambda: program(stext=BASE + 8), "unknown way"),
        (lambda: program(names=bytes(100)), "no name"),
        (lambda: program(names=b"\xff\xff" * 0x8000), "no end"),
    ],
)
def test_tables_of_an_unknown_kind_are_refused(program, words):
    with pytest.raises(ValueError, match=words):
        Kallsyms(program())
