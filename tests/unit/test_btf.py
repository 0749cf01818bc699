# SPDX-License-Identifier: GPL-2.0-only
import pickle
import random
import struct
import sys
import time

import pytest

from kvirt.btf import Btf, Kind, Member, kernel_btf
from kvirt.errors import KvirtError

from .btf_assembler import SIGNED, Assembler


def everything() -> Assembler:
    """All kinds, in a few types."""
    a = Assembler()
    a.int("long unsigned int", 8)
    a.int("int", 4, SIGNED)
    char = a.int("char", 1, SIGNED)
    pages = a.add(8, "pages_t", 1)
    constant = a.add(10, "", char)
    name = a.ptr(constant)
    comm = a.array(char, 16)
    inner = a.struct("", 16, [("start", pages, 0), ("end", pages, 64)])
    either = a.union("", 16, [("", inner, 0), ("rcu", 1, 64)])
    node = a.struct("node", 24, [("left", 0, 0), ("last", 1, 128)])
    a.struct("vma", 72, [("mm", 6, 0), ("", either, 64), ("shared", node, 192), ("comm", comm, 384)])
    a.struct("bits", 4, [("low", 2, 3 << 24), ("high", 2, 5 << 24 | 3), ("whole", 2, 0)], flag=True)
    five = a.int("int", 4, SIGNED, bits=5, offset=2)
    a.struct("old_bits", 4, [("some", five, 8)])
    a.enum("colour", [("RED", 0), ("BLUE", 7), ("ALL", 0xFFFFFFFF)])
    a.enum("", [("MINUS", -2)], signed=True)
    a.enum64("wide", [("WIDE", 1 << 40 | 1), ("WIDE_MAX", (1 << 64) - 1)])
    a.enum64("deep", [("DEEP", -1 << 35)], signed=True)
    a.add(7, "unseen", 0)
    a.add(7, "unseen_union", 0, flag=True)
    a.add(9, "", 2)
    restricted = a.add(11, "", name)
    a.func("put", 0, [("to", restricted), ("count", pages)])
    a.func("print", 2, [("format", name), ("", 0)])
    a.add(14, "jiffies", 1, 0)
    a.add(15, ".data", 8, 25, 0, 8, vlen=1)
    a.add(16, "double", 8)
    a.add(17, "kfunc", 25, 0xFFFFFFFF)
    tagged = a.add(18, "user", char)
    a.ptr(tagged)
    a.ptr(a.proto(0, [("", name)]))
    return a


@pytest.fixture(scope="module")
def btf() -> Btf:
    return Btf(everything().finish())


def only(btf: Btf, kind: Kind, name: str) -> int:
    (found,) = btf.named(kind, name)
    return found


def test_every_kind_is_passed(btf):
    assert {btf.kind(i) for i in range(len(btf))} == set(Kind)
    assert btf.name(only(btf, Kind.FLOAT, "double")) == "double"
    assert btf.name(0) == "void"


def test_another_process_is_told_all_of_it(btf):
    (vma,) = btf.named(Kind.STRUCT, "vma")
    sent = pickle.loads(pickle.dumps(btf))
    # What it has found already it still knows.
    for told in (sent, pickle.loads(pickle.dumps(sent))):
        assert [(told.kind(i), told.name(i), told.members(i)) for i in range(len(told))] == [
            (btf.kind(i), btf.name(i), btf.members(i)) for i in range(len(btf))
        ]
        assert told.named(Kind.STRUCT, "vma") == (vma,)
        assert told.named(Kind.STRUCT, "node") == btf.named(Kind.STRUCT, "node") != ()
        assert told.named(Kind.STRUCT, "nothing") == ()


def test_names_are_whole_and_of_their_kind(btf):
    assert btf.named(Kind.STRUCT, "ode") == ()
    assert btf.named(Kind.STRUCT, "colour") == ()
    assert btf.named(Kind.STRUCT, "missing") == ()
    assert btf.named(Kind.INT, "int") == (2, 13)


def test_a_name_may_be_the_end_of_another():
    a = Assembler()
    a.int("vm_page", 8)
    a.types.append(a.words(a.string("vm_page") + 3, 4 << 24, 0))
    assert Btf(a.finish()).named(Kind.STRUCT, "page") == (2,)


def test_members_are_found_through_anonymous_ones_and_by_path(btf):
    vma = only(btf, Kind.STRUCT, "vma")
    assert [m.name for m in btf.members(vma)] == ["mm", "", "shared", "comm"]
    assert [(m.name, m.offset) for m in btf.all_members(vma)] == [
        ("mm", 0),
        ("start", 8),
        ("end", 16),
        ("rcu", 16),
        ("shared", 24),
        ("comm", 48),
    ]
    assert btf.member(vma, "shared.last") == Member("shared.last", 1, 8 * 40, None)
    assert btf.member(vma, "end.last") is None
    assert btf.member(vma, "last") is None
    assert list(btf.all_members(1)) == []


def test_sizes(btf):
    vma = only(btf, Kind.STRUCT, "vma")
    sizes = {m.name: btf.sizeof(m.type) for m in btf.all_members(vma)}
    assert sizes == {"mm": 8, "start": 8, "end": 8, "rcu": 8, "shared": 24, "comm": 16}
    assert btf.sizeof(vma) == 72
    assert btf.sizeof(only(btf, Kind.ENUM64, "wide")) == 8
    with pytest.raises(KvirtError, match="should have a size"):
        btf.sizeof(only(btf, Kind.FWD, "unseen"))


def test_bit_fields_in_both_encodings(btf):
    bits = only(btf, Kind.STRUCT, "bits")
    assert [(m.bit_offset, m.bit_size) for m in btf.members(bits)] == [(0, 3), (3, 5), (0, None)]
    old = only(btf, Kind.STRUCT, "old_bits")
    assert [(m.bit_offset, m.bit_size, m.offset) for m in btf.members(old)] == [(10, 5, 1)]


def test_enumerators(btf):
    values = {
        "RED": 0,
        "BLUE": 7,
        "ALL": 0xFFFFFFFF,
        "MINUS": -2,
        "WIDE": 1 << 40 | 1,
        "WIDE_MAX": (1 << 64) - 1,
        "DEEP": -1 << 35,
        "LUE": None,
        "jiffies": None,
    }
    assert {name: btf.enumerator(name) for name in values} == values


def test_prototypes(btf):
    put = btf.prototype(only(btf, Kind.FUNC, "put"))
    assert put is not None
    assert [(p.name, btf.spell(p.type)) for p in put.parameters] == [
        ("to", "const char *restrict"),
        ("count", "pages_t"),
    ]
    assert btf.spell(put.returns) == "void"
    variadic = btf.prototype(only(btf, Kind.FUNC, "print"))
    assert variadic is not None
    assert variadic.variadic
    assert [p.name for p in variadic.parameters] == ["format"]
    assert btf.prototype(1) is None


def test_c_spelling():
    a = Assembler()
    int_ = a.int("int", 4, SIGNED)
    unsigned = a.int("long unsigned int", 8)
    page = a.struct("page", 64, [])
    page_p = a.ptr(page)
    anonymous = a.union("", 0, [])
    rows = a.array(a.array(int_, 3), 2)
    callback = a.ptr(a.proto(int_, [("", page_p), ("", 0)]))
    const_p = a.add(10, "", a.add(9, "", page_p))
    spelled = {
        0: "void",
        unsigned: "unsigned long",
        a.ptr(page_p): "struct page **",
        anonymous: "union {...}",
        a.ptr(a.add(10, "", a.add(9, "", int_))): "const volatile int *",
        const_p: "struct page *volatile const",
        a.ptr(const_p): "struct page *volatile const *",
        rows: "int [2][3]",
        a.ptr(rows): "int (*)[2][3]",
        a.array(page_p, 4): "struct page *[4]",
        callback: "int (*)(struct page *, ...)",
        a.array(callback, 2): "int (*[2])(struct page *, ...)",
        a.add(7, "x", 0): "struct x",
        a.add(7, "x", 0, flag=True): "union x",
        a.ptr(a.add(18, "rcu", page)): "struct page *",
    }
    func = a.func("get", page_p, [("address", unsigned), ("callback", callback)])
    nothing = a.func("nothing", 0, [])
    btf = Btf(a.finish())
    assert {i: btf.spell(i) for i in spelled} == spelled
    assert (
        btf.declaration(func)
        == "struct page *get(unsigned long address, int (*callback)(struct page *, ...))"
    )
    assert btf.declaration(nothing) == "void nothing(void)"


def test_functions_of_one_prototype():
    a = Assembler()
    int_ = a.int("int", 4, SIGNED)
    # The same structure twice, as when types of two files were not found equal.
    pages = [a.ptr(a.struct("page", 64, [("x", int_, offset)])) for offset in (0, 32)]
    pointer = a.ptr(a.proto(int_, [("", pages[0]), ("", int_)]))
    a.func("second", int_, [("page", pages[1]), ("flags", int_)])
    a.func("first", int_, [("p", pages[0]), ("n", int_)])
    a.func("other_result", 0, [("p", pages[0]), ("n", int_)])
    a.func("other_parameter", int_, [("p", pages[0]), ("n", pages[0])])
    a.func("fewer", int_, [("p", pages[0])])
    a.func("variadic", int_, [("p", pages[0]), ("n", int_), ("", 0)])
    a.func("more", int_, [("p", pages[0]), ("n", int_), ("m", int_)])
    btf = Btf(a.finish())
    prototype = btf.prototype(pointer)
    assert prototype is not None
    assert btf.functions_like(prototype) == ["first", "second"]
    variadic = btf.prototype(only(btf, Kind.FUNC, "variadic"))
    assert variadic is not None
    assert btf.functions_like(variadic) == ["variadic"]


def test_the_layout_section_tells_of_unknown_kinds():
    a = everything()
    kinds = 24
    a.layout = bytes(4 * 22) + struct.pack("=BBH", 8, 4, 0) + bytes(4)
    a.add(22, "", 0, 1, 2, 3, 4, 5, vlen=3)
    after = a.struct("after", 8, [])
    assert len(a.layout) == 4 * kinds
    btf = Btf(a.finish())
    assert btf.named(Kind.STRUCT, "after") == (after,)
    assert btf.kind(after - 1) == 22
    with pytest.raises(KvirtError, match="should be the type"):
        btf.spell(after - 1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "shorter than its header"),
        (b"\x7fELF" + bytes(60), "starts with 7f 45 4c"),
        (Assembler("<>"[sys.byteorder == "little"]).finish(), "starts with"),
        (Assembler().finish()[:-1], "a part of it is missing"),
        (Assembler().finish()[:-1] + b"x", "strings have no end"),
    ],
)
def test_what_is_no_btf_is_refused(data, words):
    with pytest.raises(KvirtError, match=words):
        Btf(data)


def test_btf_without_types():
    btf = Btf(Assembler().finish())
    assert len(btf) == 1
    assert btf.named(Kind.STRUCT, "page") == ()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ((0, 22 << 24, 0), "types of kind 22"),
        ((0, 0, 0), "do not end|no kind"),
        ((0, 5, 0), "no kind"),
        ((0, 4 << 24 | 0xFFFFFF, 0), "do not end"),
        ((0, 1 << 24, 0), "do not end"),
        ((0,), "do not end"),
    ],
)
def test_damaged_records_are_refused(record, words):
    a = Assembler()
    a.int("int", 4)
    a.types.append(a.words(*record))
    with pytest.raises(KvirtError, match=words):
        Btf(a.finish())


def test_types_without_an_end_are_refused():
    a = Assembler()
    typedef = a.add(8, "loop", 1)
    pointer = a.ptr(2)
    array = a.add(3, "", 0, 3, 0, 0xFFFFFFFF)
    proto = a.add(13, "", 0, 0, 5, 0, 5, vlen=2)
    proto_p = a.ptr(4)
    itself = a.add(4, "itself", 8, 0, 6, 64, vlen=1)
    missing = a.ptr(99)
    btf = Btf(a.finish())
    for type_id in (typedef, array):
        with pytest.raises(KvirtError, match="no end"):
            btf.sizeof(type_id)
    for type_id in (pointer, array, proto, proto_p):
        with pytest.raises(KvirtError, match="no end"):
            btf.spell(type_id)
    assert list(btf.all_members(itself)) == []
    with pytest.raises(KvirtError, match="speaks of type 99"):
        btf.spell(missing)


def ask_everything(data: bytes) -> None:
    """Whatever can be asked: an answer or KvirtError."""
    try:
        btf = Btf(data)
    except KvirtError:
        return
    questions = [btf.kind, btf.name, btf.sizeof, btf.members, btf.prototype, btf.spell, btf.declaration]
    questions += [lambda i: list(btf.all_members(i)), lambda i: btf.member(i, "shared.last")]
    for type_id in range(len(btf)):
        for question in questions:
            try:
                answer = question(type_id)
                if question == btf.prototype and answer:
                    btf.functions_like(answer)
            except KvirtError:
                pass
    for name in ("vma", "put", "colour", "RED", "WIDE", "MINUS", "int"):
        try:
            btf.enumerator(name)
            for kind in Kind:
                btf.named(kind, name)
        except KvirtError:
            pass


def test_names_of_damaged_types_can_be_printed():
    a = Assembler()
    a.int("\x1b[2J", 4)
    a.types.append(a.words(len(a.strings), 1 << 24, 4, 32))
    a.strings += b"\xff\0"
    btf = Btf(a.finish())
    assert [btf.spell(1), btf.spell(2)] == ["\\x1b[2J", "\\xff"]


def test_truncated_anywhere():
    data = everything().finish()
    for end in range(len(data)):
        with pytest.raises(KvirtError):
            Btf(data[:end])


def test_any_damage_ends_soon_and_in_a_sentence():
    data, rng = everything().finish(), random.Random(1)
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(len(data))] = rng.choice((0, 1, 2, 3, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        start = time.monotonic()
        ask_everything(bytes(damaged))
        assert time.monotonic() - start < 5


def test_kernels_without_btf(tmp_path):
    with pytest.raises(KvirtError, match="CONFIG_DEBUG_INFO_BTF"):
        kernel_btf(tmp_path / "vmlinux")
    with pytest.raises(KvirtError, match="cannot be read"):
        kernel_btf(tmp_path)
    whole = tmp_path / "btf"
    whole.write_bytes(everything().finish())
    assert kernel_btf(whole).named(Kind.STRUCT, "vma")
