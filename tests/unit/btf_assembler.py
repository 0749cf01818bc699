# SPDX-License-Identifier: GPL-2.0-only
"""Makes BTF, a type at a time; follows Documentation/bpf/btf.rst, not kvirt.btf."""

from __future__ import annotations

import struct
from collections.abc import Sequence

SIGNED = 1 << 24


class Assembler:
    """Types are added one after the other, and known by the number that adding them gives."""

    def __init__(self, order: str = "=") -> None:
        self.order = order
        self.strings = b"\0"
        self.types: list[bytes] = []
        self.layout: bytes | None = None

    def words(self, *words: int) -> bytes:
        return struct.pack(f"{self.order}{len(words)}I", *(word & 0xFFFFFFFF for word in words))

    def string(self, text: str) -> int:
        if not text:
            return 0
        known = self.strings.find(b"\0" + text.encode() + b"\0")
        if known >= 0:
            return known + 1
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text.encode()) - 1

    def add(self, kind: int, name: str, third: int, *extra: int, vlen: int = 0, flag: bool = False) -> int:
        info = flag << 31 | kind << 24 | vlen
        self.types.append(self.words(self.string(name), info, third, *extra))
        return len(self.types)

    def int(self, name: str, size: int, encoding: int = 0, bits: int | None = None, offset: int = 0) -> int:
        return self.add(1, name, size, encoding | offset << 16 | (8 * size if bits is None else bits))

    def ptr(self, target: int) -> int:
        return self.add(2, "", target)

    def array(self, element: int, count: int, index: int = 0) -> int:
        return self.add(3, "", 0, element, index, count)

    def struct(
        self, name: str, size: int, members: Sequence[tuple[str, int, int]], kind: int = 4, flag: bool = False
    ) -> int:
        """Members are name, type and offset in bits (with the flag: and the bit field's size << 24)."""
        words = [w for n, t, o in members for w in (self.string(n), t, o)]
        return self.add(kind, name, size, *words, vlen=len(members), flag=flag)

    def union(self, name: str, size: int, members: Sequence[tuple[str, int, int]]) -> int:
        return self.struct(name, size, members, kind=5)

    def enum(self, name: str, values: Sequence[tuple[str, int]], size: int = 4, signed: bool = False) -> int:
        words = [w for n, v in values for w in (self.string(n), v)]
        return self.add(6, name, size, *words, vlen=len(values), flag=signed)

    def enum64(self, name: str, values: Sequence[tuple[str, int]], signed: bool = False) -> int:
        words = [w for n, v in values for w in (self.string(n), v, v >> 32)]
        return self.add(19, name, 8, *words, vlen=len(values), flag=signed)

    def proto(self, returns: int, parameters: Sequence[tuple[str, int]]) -> int:
        words = [w for n, t in parameters for w in (self.string(n), t)]
        return self.add(13, "", returns, *words, vlen=len(parameters))

    def func(self, name: str, returns: int, parameters: Sequence[tuple[str, int]]) -> int:
        return self.add(12, name, self.proto(returns, parameters), vlen=1)

    def finish(self) -> bytes:
        types = b"".join(self.types)
        header = 24 if self.layout is None else 32
        data = struct.pack(f"{self.order}HBBI", 0xEB9F, 1, 0, header)
        data += self.words(0, len(types), len(types), len(self.strings))
        if self.layout is not None:
            data += self.words(len(types) + len(self.strings), len(self.layout))
        return data + types + self.strings + (self.layout or b"")
