# SPDX-License-Identifier: GPL-2.0-only
"""BTF: the types and prototypes that a kernel carries along (Documentation/bpf/btf.rst).

A type is known by its number, from 1 upwards in the order of the records; 0 is ``void``. Only the places
of the records are taken down in advance, by one pass that is made as short as Python allows: a kernel has
more than 100,000 of them, and of these few are ever asked for. Nothing here needs drgn.

What is damaged gives KvirtError, when it is asked for at the latest.
"""

from __future__ import annotations

import enum
import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import compress, islice
from pathlib import Path
from typing import Any

from kvirt.errors import KvirtError, printable

# include/uapi/linux/btf.h
_MAGIC = 0xEB9F
_VERSION = 1
_HEADER = struct.Struct("=HBBIIIII")
# layout_off and layout_len, which newer headers have (7.x).
_HEADER_LAYOUT = struct.Struct("=II")
_LAYOUT = struct.Struct("=BBH")
_VLEN = 0xFFFFFF
_KIND_FLAG = 1 << 31
# Typedefs and qualifiers of qualifiers, arrays of arrays: more than any compiler writes.
_DEEP = 64
# Characters of a type in C.
_LONG = 4096
# Records that the pass over them takes at once.
_BLOCK = 4096


class Kind(enum.IntEnum):
    """``BTF_KIND_...``."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


# Words after the three of struct btf_type: once, and for each of its vlen elements.
_EXTRA = {Kind.INT: 1, Kind.ARRAY: 3, Kind.VAR: 1, Kind.DECL_TAG: 1}
_ELEMENT = {
    Kind.STRUCT: 3,
    Kind.UNION: 3,
    Kind.ENUM: 2,
    Kind.FUNC_PROTO: 2,
    Kind.DATASEC: 3,
    Kind.ENUM64: 3,
}
_SIZED = (Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.DATASEC, Kind.FLOAT, Kind.ENUM64)
_QUALIFIERS = {Kind.CONST: "const", Kind.VOLATILE: "volatile", Kind.RESTRICT: "restrict"}
# How gcc calls what everybody else calls otherwise.
_INTEGERS = {
    "short int": "short",
    "short unsigned int": "unsigned short",
    "long int": "long",
    "long unsigned int": "unsigned long",
    "long long int": "long long",
    "long long unsigned int": "unsigned long long",
    "_Bool": "bool",
}
# What a type is the same without, when its members or size are asked for.
_ALIASES = (Kind.TYPEDEF, Kind.TYPE_TAG, *_QUALIFIERS)
_KEYWORDS = {Kind.STRUCT: "struct ", Kind.UNION: "union ", Kind.ENUM: "enum ", Kind.ENUM64: "enum "}


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a structure or union."""

    name: str
    """Empty if it is an anonymous structure or union."""
    type: int
    bit_offset: int
    """From the start of the structure that was asked for."""
    bit_size: int | None
    """Of a bit field, else None."""

    @property
    def offset(self) -> int:
        """Offset in bytes; of a bit field that of the byte in which it starts."""
        return self.bit_offset // 8


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a function; those of function pointers have no names."""

    name: str
    type: int


@dataclass(frozen=True, slots=True)
class Prototype:
    """What a function takes and gives."""

    returns: int
    parameters: tuple[Parameter, ...]
    variadic: bool


def _damaged(what: str) -> KvirtError:
    return KvirtError(
        f"The kernel's type information (BTF) is damaged, or of a kind that kvirt does not know ({what}): "
        "boot a kernel whose BTF is sound, or report this kernel's version."
    )


class _Sizes(dict[int, int]):
    """Words of a record, by the ``info`` of its struct btf_type: there are a few hundred different ones.

    :param known: by kinds that this module does not know, what the layout section says of them
    """

    def __init__(self, known: dict[int, tuple[int, int]]) -> None:
        # What follows the last record counts as a record without size: see Btf._find_records().
        super().__init__({0: 0})
        self._known = known

    def __missing__(self, info: int) -> int:
        number = info >> 24 & 0x7F
        try:
            kind = Kind(number)
            extra, element = _EXTRA.get(kind, 0), _ELEMENT.get(kind, 0)
        except ValueError:
            if number not in self._known:
                raise _damaged(f"it has types of kind {number}") from None
            kind = None
            extra, element = self._known[number]
        if kind is Kind.VOID:
            raise _damaged("it has a type of no kind")
        # The vlen of a FUNC is its linkage.
        size = self[info] = 3 + extra + (element * (info & _VLEN) if element else 0)
        return size


def _sections(data: bytes) -> tuple[bytes, bytes, dict[int, tuple[int, int]]]:
    """Types, strings, and what is told of kinds that this module does not know."""
    if len(data) < _HEADER.size:
        raise _damaged("it is shorter than its header")
    magic, version, _, start, type_off, type_len, str_off, str_len = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise _damaged(f"it starts with {data[:3].hex(' ')}")
    if start < _HEADER.size or (type_off | type_len) & 3:
        raise _damaged("its header does not make sense")
    for offset, length in ((type_off, type_len), (str_off, str_len)):
        if start + offset + length > len(data):
            raise _damaged("a part of it is missing")
    types = data[start + type_off : start + type_off + type_len]
    strings = data[start + str_off : start + str_off + str_len]
    return types, strings, _unknown_kinds(data, start)


class Btf:
    """The types of one kernel, or of it and one of its modules.

    :param data: what /sys/kernel/btf/vmlinux, or the section .BTF of a vmlinux, holds
    :param base: if that is a module's, the kernel's; the module's types are then found beside these
    :raises KvirtError: if it is not BTF of this machine's byte order, or damaged
    """

    def __init__(self, data: bytes, base: Btf | None = None) -> None:
        types, self._strings, known = _sections(data)
        if (self._strings[:1] != b"\0" and base is None) or self._strings[-1:] not in (b"\0", b""):
            raise _damaged("its strings have no end")
        if base is not None:
            # A module's types and strings are numbered on from those of the kernel.
            types, self._strings = base._words.tobytes() + types, base._strings + self._strings
            known = {**base._unknown, **known}
        self._unknown: dict[int, tuple[int, int]] = known
        self._words: array[int] = array("I", types)
        self._records = self._find_records(_Sizes(known))
        # The kind is in the uppermost byte of the second word of a record.
        uppermost = types[7 if sys.byteorder == "little" else 4 :: 4]
        kinds = bytes(map(uppermost.__getitem__, islice(self._records, 1, None)))
        self._kinds = b"\0" + kinds.translate(bytes(i & 0x7F for i in range(256)))
        self._named: dict[tuple[Kind, str], tuple[int, ...]] = {}
        self._forget()

    def _forget(self) -> None:
        """Be without what is made of the rest when it is asked for."""
        self._of_kinds: dict[Kind, list[int]] = {}
        self._by_name: dict[Kind, tuple[list[int], dict[int, int]]] = {}
        self._enumerators: dict[int, int] | None = None
        self._members: dict[int, tuple[Member, ...]] = {}
        self._spelled: dict[int, str] = {}

    def __getstate__(self) -> tuple[object, ...]:
        # Numbers one by one, and tables of them, take longer to send than all the rest.
        return self._unknown, self._words, self._strings, array("i", self._records), self._kinds, self._named

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._unknown, self._words, self._strings, records, self._kinds, self._named = state
        self._records = records.tolist()
        self._forget()

    def _find_records(self, sizes: _Sizes) -> list[int]:
        """Index in the words of each type's record, by its number."""
        end = len(self._words)
        infos = self._words[1:]
        # Past the end, the same index is found again and again until the block is full.
        infos.extend((0, 0))
        records, at = [-1, 0], 0
        try:
            for _ in range(end // (3 * _BLOCK) + 1):
                records += [at := at + sizes[infos[at]] for _ in range(_BLOCK)]
                if at == end:
                    break
        except IndexError:
            at = -1
        if at != end:
            raise _damaged("its types do not end where they should")
        del records[bisect_left(records, end) :]
        return records

    def __len__(self) -> int:
        """Types there are, ``void`` included."""
        return len(self._records)

    def _record(self, type_id: int) -> int:
        if not 0 < type_id < len(self._records):
            raise _damaged(f"it speaks of type {type_id}, and has {len(self._records)}")
        return self._records[type_id]

    def _string(self, offset: int) -> str:
        if offset >= len(self._strings):
            raise _damaged("a name is missing")
        name = self._strings[offset : self._strings.index(0, offset)].decode(errors="backslashreplace")
        # Damaged names end up in sentences too.
        return name if name.isprintable() else printable(name)

    def _offsets(self, name: str) -> Iterator[int]:
        """Where a name is among the strings; also at the end of a longer one."""
        wanted, at = name.encode() + b"\0", -1
        while (at := self._strings.find(wanted, at + 1)) >= 0:
            yield at

    def kind(self, type_id: int) -> int:
        """Return which of :class:`Kind` a type is, or the number of a kind that has no name there."""
        if type_id:
            self._record(type_id)
        return self._kinds[type_id]

    def name(self, type_id: int) -> str:
        """Return the name of a type, a function or a variable; empty if it has none."""
        return self._string(self._words[self._record(type_id)]) if type_id else "void"

    def _of_kind(self, kind: Kind) -> list[int]:
        """Records of all types of a kind."""
        if kind not in self._of_kinds:
            wanted = self._kinds.translate(bytes(i == kind for i in range(256)))
            self._of_kinds[kind] = list(compress(self._records, wanted))
        return self._of_kinds[kind]

    def named(self, kind: Kind, name: str) -> tuple[int, ...]:
        """Return the types of a kind and name, in their order: none, one, or several that differ."""
        if (kind, name) not in self._named:
            self._named[kind, name] = self._find_named(kind, name)
        return self._named[kind, name]

    def _find_named(self, kind: Kind, name: str) -> tuple[int, ...]:
        records = self._of_kind(kind)
        if kind not in self._by_name:
            names = [self._words[record] for record in records]
            self._by_name[kind] = (names, dict(zip(names, records, strict=True)))
        names, by_name = self._by_name[kind]
        for offset in self._offsets(name):
            if offset in by_name:
                found = [by_name[offset]]
                if names.count(offset) > 1:
                    found = [record for record in records if self._words[record] == offset]
                return tuple(bisect_left(self._records, record) for record in found)
        return ()

    def resolve(self, type_id: int) -> int:
        """Follow typedefs, qualifiers and tags to the type that they stand for."""
        return self._follow(type_id, _ALIASES)

    def _follow(self, type_id: int, kinds: Container[int]) -> int:
        for _ in range(_DEEP):
            if self.kind(type_id) not in kinds:
                return type_id
            type_id = self._words[self._record(type_id) + 2]
        raise _damaged("a type has no end")

    @property
    def pointer_size(self) -> int:
        """Bytes of a pointer: those of an unsigned long."""
        for name in ("long unsigned int", "unsigned long"):
            for type_id in self.named(Kind.INT, name):
                return self._words[self._record(type_id) + 2]
        raise _damaged("it has no unsigned long")

    def sizeof(self, type_id: int) -> int:
        """Return the size of a type, in bytes.

        :raises KvirtError: if it has none, as ``void``, functions, and what is only declared
        """
        count = 1
        for _ in range(_DEEP):
            type_id = self.resolve(type_id)
            kind = self._kinds[type_id]
            if kind == Kind.PTR:
                return count * self.pointer_size
            if kind in _SIZED:
                return count * self._words[self._record(type_id) + 2]
            if kind != Kind.ARRAY:
                raise _damaged(f"type {type_id} should have a size")
            record = self._record(type_id)
            type_id = self._words[record + 3]
            count *= self._words[record + 5]
        raise _damaged("an array has no end")

    def target(self, type_id: int) -> int:
        """Return the type that a pointer, typedef, qualifier, tag, function or variable is made of."""
        return self._words[self._record(type_id) + 2]

    def array(self, type_id: int) -> tuple[int, int]:
        """Return the type of an array's elements, and their number; 0 if it is not known."""
        record = self._record(type_id)
        return self._words[record + 3], self._words[record + 5]

    def is_signed(self, type_id: int) -> bool:
        """Whether an integer or an enumeration is signed."""
        record = self._record(type_id)
        if self._kinds[type_id] == Kind.INT:
            # BTF_INT_SIGNED
            return bool(self._words[record + 3] >> 24 & 1)
        return self.kind_flag(type_id)

    def kind_flag(self, type_id: int) -> bool:
        """Whether a type has ``kind_flag`` set; of what is only declared: whether it is a union."""
        return bool(self._words[self._record(type_id) + 1] & _KIND_FLAG)

    def members(self, type_id: int) -> tuple[Member, ...]:
        """Return the members of a structure or union as they are written, none for any other type.

        :param type_id: may be a typedef of it
        """
        type_id = self.resolve(type_id)
        if type_id not in self._members:
            self._members[type_id] = tuple(self._read_members(type_id))
        return self._members[type_id]

    def _read_members(self, type_id: int) -> Iterator[Member]:
        if self._kinds[type_id] not in (Kind.STRUCT, Kind.UNION):
            return
        record = self._record(type_id)
        info = self._words[record + 1]
        for at in range(record + 3, record + 3 + 3 * (info & _VLEN), 3):
            name, member_type, offset = self._words[at : at + 3]
            if info & _KIND_FLAG:
                bit_size: int | None = offset >> 24 or None
                offset &= 0xFFFFFF
            else:
                bits = self._bits_of_int(member_type)
                bit_size = bits[1] if bits else None
                offset += bits[0] if bits else 0
            yield Member(self._string(name), member_type, offset, bit_size)

    def _bits_of_int(self, type_id: int) -> tuple[int, int] | None:
        """Bit offset and size of an integer that is less than its bytes: how bit fields were once told."""
        type_id = self.resolve(type_id)
        if self._kinds[type_id] != Kind.INT:
            return None
        record = self._record(type_id)
        size, encoding = self._words[record + 2 : record + 4]
        offset, bits = encoding >> 16 & 0xFF, encoding & 0xFF
        return None if offset == 0 and bits == 8 * size else (offset, bits)

    def all_members(self, type_id: int) -> Iterator[Member]:
        """Yield the members of a structure or union that have names, those of anonymous ones included."""
        todo, seen = [(0, m) for m in reversed(self.members(type_id))], {type_id}
        while todo:
            base, member = todo.pop()
            base += member.bit_offset
            if member.name:
                yield Member(member.name, member.type, base, member.bit_size)
            elif member.type not in seen:
                # Damaged BTF may have a structure within itself.
                seen.add(member.type)
                todo += [(base, m) for m in reversed(self.members(member.type))]

    def member(self, type_id: int, path: str) -> Member | None:
        """Find ``a.b.c`` in a structure or union, None if there is no such member."""
        bits, found = 0, None
        for name in path.split("."):
            found = next((m for m in self.all_members(type_id) if m.name == name), None)
            if found is None:
                return None
            bits += found.bit_offset
            type_id = found.type
        return found and Member(path, found.type, bits, found.bit_size)

    def prototype(self, type_id: int) -> Prototype | None:
        """Return the prototype of a function, or of what a pointer to a function points to; else None."""
        type_id = self.resolve(type_id)
        if self._kinds[type_id] in (Kind.FUNC, Kind.PTR):
            type_id = self.resolve(self._words[self._record(type_id) + 2])
        if self._kinds[type_id] != Kind.FUNC_PROTO:
            return None
        record = self._record(type_id)
        start, end = record + 3, record + 3 + 2 * (self._words[record + 1] & _VLEN)
        pairs = list(zip(self._words[start:end:2], self._words[start + 1 : end : 2], strict=True))
        # BTF ends the parameters of a variadic function with one that has neither name nor type.
        variadic = bool(pairs) and pairs[-1] == (0, 0)
        if variadic:
            pairs.pop()
        parameters = tuple(Parameter(self._string(name), type_) for name, type_ in pairs)
        return Prototype(self._words[record + 2], parameters, variadic)

    def functions_like(self, prototype: Prototype) -> list[str]:
        """Return the names of all functions with the same types of parameters and result, sorted."""
        wanted = [self.spell(prototype.returns), *(self.spell(p.type) for p in prototype.parameters)]
        count = len(prototype.parameters) + prototype.variadic
        info, words, protos = Kind.FUNC_PROTO << 24 | count, self._words, set()
        for record in [r for r in self._of_kind(Kind.FUNC_PROTO) if words[r + 1] == info]:
            types = words[record + 2 : record + 3 + 2 * count : 2]
            if prototype.variadic and types.pop() != 0:
                continue
            if all(self.spell(t) == w for t, w in zip(types, wanted, strict=True)):
                protos.add(bisect_left(self._records, record))
        return sorted({self._string(words[r]) for r in self._of_kind(Kind.FUNC) if words[r + 2] in protos})

    def enumerator(self, name: str) -> int | None:
        """Return the value of an enumerator, None if there is none of that name.

        If several enumerations have one, it is that of any of them.
        """
        found = self.find_enumerator(name)
        return found and found[1]

    def find_enumerator(self, name: str) -> tuple[int, int] | None:
        """Return the enumeration and the value of an enumerator, as :meth:`enumerator` finds it."""
        for offset in self._offsets(name):
            if self._enumerators is None:
                self._enumerators = {}
                for kind in (Kind.ENUM64, Kind.ENUM):
                    for record in self._of_kind(kind):
                        names = self._words[self._elements(record, _ELEMENT[kind])]
                        self._enumerators.update(dict.fromkeys(names, record))
            if offset in self._enumerators:
                record = self._enumerators[offset]
                return bisect_left(self._records, record), self._value(record, offset)
        return None

    def enumerators(self, type_id: int) -> list[tuple[str, int]]:
        """Return the names and values of an enumeration, in their order; none for any other type."""
        if self.kind(type_id) not in (Kind.ENUM, Kind.ENUM64):
            return []
        record = self._record(type_id)
        step = _ELEMENT[Kind(self._kinds[type_id])]
        places = range(*self._elements(record, step).indices(len(self._words)))
        return [(self._string(self._words[at]), self._value_at(record, at, step)) for at in places]

    def _elements(self, record: int, step: int) -> slice:
        """Words in which the elements of a record start."""
        return slice(record + 3, record + 3 + step * (self._words[record + 1] & _VLEN), step)

    def _value(self, record: int, name: int) -> int:
        step = _ELEMENT[Kind(self._words[record + 1] >> 24 & 0x7F)]
        at = record + 3 + step * self._words[self._elements(record, step)].index(name)
        return self._value_at(record, at, step)

    def _value_at(self, record: int, at: int, step: int) -> int:
        """Value of the enumerator that starts at a word."""
        info = self._words[record + 1]
        value = self._words[at + 1] | (self._words[at + 2] << 32 if step == 3 else 0)
        bits = 32 * (step - 1)
        return value - (1 << bits) if info & _KIND_FLAG and value >> (bits - 1) else value

    def spell(self, type_id: int) -> str:
        """Spell a type as C does ("struct vm_area_struct **", "unsigned long")."""
        if type_id not in self._spelled:
            self._spelled[type_id] = self._spell(type_id, "", 0)
        return self._spelled[type_id]

    def declaration(self, type_id: int) -> str:
        """Spell the declaration of a function as C does."""
        return self._spell(self._words[self._record(type_id) + 2], self.name(type_id), 0)

    def _spell(self, type_id: int, declarator: str, depth: int) -> str:
        before: list[str] = []
        for _ in range(_DEEP):
            kind = self.kind(type_id)
            if len(declarator) > _LONG or depth > _DEEP:
                break
            if kind in _KEYWORDS or kind in (Kind.VOID, Kind.INT, Kind.FLOAT, Kind.TYPEDEF, Kind.FWD):
                return " ".join([*before, self._spell_name(type_id), declarator]).rstrip()
            target = self._words[self._record(type_id) + 2]
            if kind == Kind.PTR:
                declarator = f"*{declarator}"
                if self.kind(target) in (Kind.ARRAY, Kind.FUNC_PROTO):
                    declarator = f"({declarator})"
            elif kind in _QUALIFIERS:
                word = _QUALIFIERS[Kind(kind)]
                if self.kind(self._follow(target, _QUALIFIERS)) == Kind.PTR:
                    declarator = f"{word} {declarator}".rstrip()
                else:
                    before.append(word)
            elif kind == Kind.ARRAY:
                element, _, count = self._words[self._record(type_id) + 3 : self._record(type_id) + 6]
                declarator, target = f"{declarator}[{count}]", element
            elif kind == Kind.FUNC_PROTO:
                declarator += f"({self._spell_parameters(type_id, depth)})"
            elif kind != Kind.TYPE_TAG:
                raise _damaged(f"type {type_id} should be the type of something")
            type_id = target
        raise _damaged("a type has no end")

    def _spell_name(self, type_id: int) -> str:
        kind = self._kinds[type_id]
        if kind == Kind.FWD:
            kind = Kind.UNION if self.kind_flag(type_id) else Kind.STRUCT
        name = self.name(type_id)
        if kind in _KEYWORDS:
            return _KEYWORDS[Kind(kind)] + (name or "{...}")
        return _INTEGERS.get(name, name)

    def _spell_parameters(self, type_id: int, depth: int) -> str:
        prototype = self.prototype(type_id)
        assert prototype is not None
        words, length = [], 0
        for parameter in prototype.parameters:
            words.append(self._spell(parameter.type, parameter.name, depth + 1))
            length += len(words[-1])
            if length > _LONG:
                raise _damaged("a type has no end")
        if prototype.variadic:
            words.append("...")
        return ", ".join(words) or "void"


def _unknown_kinds(data: bytes, start: int) -> dict[int, tuple[int, int]]:
    """Words of the kinds that came after this module was written, if the layout section tells them."""
    if start < _HEADER.size + _HEADER_LAYOUT.size:
        return {}
    offset, length = _HEADER_LAYOUT.unpack_from(data, _HEADER.size)
    section = data[start + offset : start + offset + length]
    if len(section) < length or length % _LAYOUT.size:
        raise _damaged("a part of it is missing")
    known = {}
    for number, (info_size, element_size, _) in enumerate(_LAYOUT.iter_unpack(section)):
        if (info_size | element_size) & 3:
            raise _damaged("its header does not make sense")
        known[number] = (info_size // 4, element_size // 4)
    return known


def kernel_btf(path: Path = Path("/sys/kernel/btf/vmlinux")) -> Btf:
    """Read the BTF of the running kernel.

    :raises KvirtError: if it has none, or none that can be used
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise KvirtError(
            f"This kernel does not tell its types ({path} does not exist): boot one that is built with "
            "CONFIG_DEBUG_INFO_BTF, as distributions build theirs."
        ) from None
    except OSError as error:
        raise KvirtError(
            f"The kernel's type information {path} cannot be read ({error.strerror}): run kvirt as root, "
            "where /sys is mounted."
        ) from None
    return Btf(data)
