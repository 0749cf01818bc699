# SPDX-License-Identifier: GPL-2.0-only
"""Types, objects and symbols of a kernel without its vmlinux: drgn finders over BTF and kallsyms.

    prog = drgn.Program()
    prog.set_core_dump("vmcore")
    use_btf(prog)
    prog["init_pid_ns"].level

Both are read from the kernel itself, also from a dead one. BTF knows all types, all functions by their
prototypes, and of variables those of the processors only. Of the others it is written down here what they
are, if they are of use to those who look at memory management, or to drgn's helpers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import drgn

from kvirt.btf import Btf, Kind, kernel_btf
from kvirt.errors import KvirtError
from kvirt.proc_kallsyms import ProcKallsyms
from kvirt.vmcoreinfo import vmcoreinfo_number, vmcoreinfo_symbols

FINDER = "btf"
"""Name of the finders in drgn."""

_CACHE_KEY = "kvirt.btf"
# A typedef of a qualifier of a pointer to a function ...: more than any source has.
_DEEP = 128
# More than anybody loads.
_MODULES_MAX = 1 << 14
# What a kernel's BTF can be at most, in bytes; Debian's are 5 MiB.
_BTF_MAX = 1 << 28

# drgn's kinds of types, and those of BTF that they are found among.
_KINDS = (
    (drgn.TypeKind.STRUCT, Kind.STRUCT),
    (drgn.TypeKind.UNION, Kind.UNION),
    (drgn.TypeKind.ENUM, Kind.ENUM),
    (drgn.TypeKind.ENUM, Kind.ENUM64),
    (drgn.TypeKind.TYPEDEF, Kind.TYPEDEF),
    (drgn.TypeKind.INT, Kind.INT),
    (drgn.TypeKind.BOOL, Kind.INT),
    (drgn.TypeKind.FLOAT, Kind.FLOAT),
)
_QUALIFIERS: Mapping[int, drgn.Qualifiers] = {
    Kind.CONST: drgn.Qualifiers.CONST,
    Kind.VOLATILE: drgn.Qualifiers.VOLATILE,
    Kind.RESTRICT: drgn.Qualifiers.RESTRICT,
}

# Variables by name, and what they are in C.
_VARIABLES: Mapping[str, str] = {
    # kernel/pid.c, mm/init-mm.c, init/init_task.c
    "init_pid_ns": "struct pid_namespace",
    "init_mm": "struct mm_struct",
    "init_task": "struct task_struct",
    # kernel/cpu.c, mm/percpu.c, mm/page_alloc.c. drgn takes a missing number of processors or nodes for one.
    "nr_cpu_ids": "unsigned int",
    "nr_node_ids": "unsigned int",
    "node_states": "nodemask_t []",
    "node_data": "struct pglist_data *[]",
    "__cpu_online_mask": "struct cpumask",
    "__cpu_possible_mask": "struct cpumask",
    "__cpu_present_mask": "struct cpumask",
    "__per_cpu_offset": "unsigned long []",
    # kernel/printk/printk.c
    "prb": "struct printk_ringbuffer *",
    # kernel/module/main.c
    "modules": "struct list_head",
    # mm/swapfile.c, mm/swap_state.c
    "nr_swapfiles": "unsigned int",
    "swap_info": "struct swap_info_struct *[]",
    "swapper_spaces": "struct address_space *[]",
    "nr_swapper_spaces": "unsigned int []",
    # mm/memory.c, mm/huge_memory.c
    "zero_pfn": "unsigned long",
    "huge_zero_pfn": "unsigned long",
    "high_memory": "void *",
    # arch/x86/kernel/head64.c, mm/sparse.c
    "phys_base": "unsigned long",
    "page_offset_base": "unsigned long",
    "vmalloc_base": "unsigned long",
    "mem_section": "struct mem_section **",
    "max_pfn": "unsigned long",
    "max_low_pfn": "unsigned long",
    # mm/vmstat.c, mm/swapfile.c
    "vm_zone_stat": "atomic_long_t []",
    "vm_node_stat": "atomic_long_t []",
    "total_swap_pages": "long",
    # mm/page_alloc.c, mm/slab_common.c
    "_totalram_pages": "atomic_long_t",
    "slab_caches": "struct list_head",
    # mm/hugetlb.c
    "hstates": "struct hstate []",
    "hugetlb_max_hstate": "int",
    "default_hstate_idx": "unsigned int",
}


class _Types:
    """drgn's types for those of BTF, made when they are asked for."""

    def __init__(self, prog: drgn.Program, btf: Btf) -> None:
        self._prog = prog
        self._btf = btf
        self._made: dict[int, drgn.Type] = {}

    def __call__(self, type_id: int, depth: int = 0) -> drgn.Type:
        if type_id not in self._made:
            if depth > _DEEP:
                raise KvirtError(
                    f"The kernel's type information (BTF) is damaged: type {type_id} has no end."
                )
            self._made[type_id] = self._make(type_id, depth + 1)
        return self._made[type_id]

    def _make(self, type_id: int, depth: int) -> drgn.Type:
        prog, btf = self._prog, self._btf
        kind = btf.kind(type_id)
        if kind == Kind.VOID:
            return prog.void_type()
        if kind in (Kind.STRUCT, Kind.UNION, Kind.FWD, Kind.ENUM, Kind.ENUM64):
            return self._tagged(type_id, kind)
        if kind == Kind.INT:
            name, size = btf.spell(type_id), btf.sizeof(type_id)
            if name == "bool":
                return prog.bool_type("_Bool", size)
            return prog.int_type(name, size, btf.is_signed(type_id))
        if kind == Kind.FLOAT:
            return prog.float_type(btf.name(type_id), btf.sizeof(type_id))
        if kind == Kind.ARRAY:
            element, length = btf.array(type_id)
            # BTF does not tell flexible arrays from those without elements, which nobody needs.
            return prog.array_type(self(element, depth), length or None)
        if kind == Kind.FUNC_PROTO:
            return self._function(type_id, depth)
        target = self(btf.target(type_id), depth)
        if kind == Kind.PTR:
            return prog.pointer_type(target)
        if kind == Kind.TYPEDEF:
            return prog.typedef_type(btf.name(type_id), target)
        if kind == Kind.TYPE_TAG:
            return target
        qualifier = _QUALIFIERS.get(kind)
        if qualifier is None:
            raise KvirtError(
                f"The kernel's type information (BTF) has a type of kind {kind}, which this version of kvirt "
                "does not know: give the kernel's vmlinux with --symbols, and report its version."
            )
        return target.qualified(target.qualifiers | qualifier)

    def _tagged(self, type_id: int, kind: int) -> drgn.Type:
        prog, btf = self._prog, self._btf
        tag = btf.name(type_id) or None
        if kind in (Kind.ENUM, Kind.ENUM64):
            enumerators = [drgn.TypeEnumerator(n, v) for n, v in btf.enumerators(type_id)]
            if not enumerators:
                return prog.enum_type(tag)
            signed, size = btf.is_signed(type_id), btf.sizeof(type_id)
            name = {1: "char", 2: "short", 4: "int", 8: "long"}.get(size, "int")
            integer = prog.int_type(name if signed else f"unsigned {name}", size, signed)
            return prog.enum_type(tag, integer, enumerators)
        if kind == Kind.FWD:
            return (prog.union_type if btf.kind_flag(type_id) else prog.struct_type)(tag)
        members = [
            drgn.TypeMember(self._member(m.type, m.bit_size), m.name or None, m.bit_offset)
            for m in btf.members(type_id)
        ]
        make = prog.struct_type if kind == Kind.STRUCT else prog.union_type
        return make(tag, btf.sizeof(type_id), members)

    def _member(self, type_id: int, bit_size: int | None) -> Callable[[], drgn.Object | drgn.Type]:
        if bit_size is None:
            return lambda: self(type_id)
        return lambda: drgn.Object(self._prog, self(type_id), bit_field_size=bit_size)

    def _function(self, type_id: int, depth: int) -> drgn.Type:
        prototype = self._btf.prototype(type_id)
        assert prototype is not None
        parameters = [
            drgn.TypeParameter(lambda type_id=p.type: self(type_id), p.name or None)
            for p in prototype.parameters
        ]
        return self._prog.function_type(self(prototype.returns, depth), parameters, prototype.variadic)


class _Finders:
    def __init__(self, prog: drgn.Program, btf: Btf) -> None:
        self._btf = btf
        self._types = _Types(prog, btf)

    def find_type(
        self, prog: drgn.Program, kinds: drgn.TypeKindSet, name: str, filename: str | None
    ) -> drgn.Type | None:
        """Follow drgn's Program.register_type_finder(). BTF knows no files, and finds nothing in them."""
        if filename:
            return None
        for theirs, ours in _KINDS:
            if theirs in kinds and (found := self._btf.named(ours, name)):
                return self._types(found[0])
        return None

    def find_object(
        self, prog: drgn.Program, name: str, flags: drgn.FindObjectFlags, filename: str | None
    ) -> drgn.Object | None:
        """Follow drgn's Program.register_object_finder()."""
        if filename:
            return None
        if flags & drgn.FindObjectFlags.CONSTANT and (found := self._btf.find_enumerator(name)):
            return drgn.Object(prog, self._types(found[0]), found[1])
        if flags & drgn.FindObjectFlags.FUNCTION:
            for type_id in self._btf.named(Kind.FUNC, name):
                return _at_symbol(prog, name, self._types(self._btf.target(type_id)))
        if flags & drgn.FindObjectFlags.VARIABLE:
            for type_id in self._btf.named(Kind.VAR, name):
                return _at_symbol(prog, name, self._types(self._btf.target(type_id)))
            if name in _VARIABLES:
                return _at_symbol(prog, name, _VARIABLES[name])
            if name == "vmemmap":
                return _vmemmap(prog)
        return None


def _at_symbol(prog: drgn.Program, name: str, type_: drgn.Type | str) -> drgn.Object | None:
    try:
        return drgn.Object(prog, type_, address=prog.symbol(name).address)
    except LookupError:
        return None


def _vmemmap(prog: drgn.Program) -> drgn.Object | None:
    """The array of all struct pages.

    VMEMMAP_START in arch/x86/include/asm/pgtable_64.h, vmemmap in arch/arm64/include/asm/pgtable.h.
    """
    try:
        base = prog.read_u64(prog.symbol("vmemmap_base").address)
    except LookupError:
        start, first = (vmcoreinfo_number(prog, name) for name in ("VMEMMAP_START", "PHYS_OFFSET"))
        if start is None or first is None:
            return None
        # memstart_addr has a sign.
        first -= (first >> 63) << 64
        page = drgn.sizeof(prog.type("struct page"))
        base = start - (first >> prog["PAGE_SHIFT"].value_()) * page & (1 << 64) - 1
    return drgn.Object(prog, "struct page *", base)


def _is_here(prog: drgn.Program) -> bool:
    """Whether this is the kernel that runs this program."""
    here = drgn.ProgramFlags.IS_LIVE | drgn.ProgramFlags.IS_LOCAL
    return bool(prog.flags & here == here)


# drgn's helpers are imported where they are called: their package brings all of them.

SymbolFinder = Callable[[drgn.Program, str | None, int | None, bool], Sequence[drgn.Symbol]]


Symbols = dict[str, list[tuple[int, int, int, int]]]
"""By name: address, size, binding and kind of each symbol. drgn's own cannot be sent to another process."""


class _ByName:
    """A symbol finder over a table of which few symbols are ever asked for, and those by name.

    drgn's own takes all of it apart in advance; it is asked for everything else.
    """

    def __init__(self, find: Callable[[str], Iterator[drgn.Symbol]] | None = None) -> None:
        """Prepare.

        :param find: None to read the table when there is a name that is not in *found*
        """
        self._find = find
        self.found: Symbols = {}
        self._index: SymbolFinder | None = None

    def __call__(
        self, prog: drgn.Program, name: str | None, address: int | None, one: bool
    ) -> Sequence[drgn.Symbol]:
        """Follow drgn's Program.register_symbol_finder()."""
        if name is not None and address is None:
            if name not in self.found:
                self._find = self._find or _table(prog)
                symbols = self._find(name)
                self.found[name] = [(s.address, s.size, s.binding.value, s.kind.value) for s in symbols]
            return [
                drgn.Symbol(name, at, size, drgn.SymbolBinding(binding), drgn.SymbolKind(kind))
                for at, size, binding, kind in self.found[name][: 1 if one else None]
            ]
        if self._index is None:
            self._index = _whole_index(prog)
        return self._index(prog, name, address, one)


def _whole_index(prog: drgn.Program) -> SymbolFinder:
    from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms

    index: SymbolFinder = load_vmlinux_kallsyms(prog)
    return index


def _table(prog: drgn.Program) -> Callable[[str], Iterator[drgn.Symbol]]:
    """Return a function that finds the symbols of a name.

    :raises KvirtError: if the kernel does not tell where they are
    """
    if _is_here(prog):
        table = ProcKallsyms(Path("/proc/kallsyms").read_bytes())
        if not table:
            raise KvirtError(
                "The kernel hides the addresses of its symbols: run kvirt as root, and with 'sysctl "
                "kernel.kptr_restrict=1' if it hides them from root too."
            )
        return table.find
    # It takes numpy, which takes long to import.
    from kvirt.kallsyms import Kallsyms

    with contextlib.suppress(LookupError, ValueError, drgn.FaultError):
        return Kallsyms(prog).find
    try:
        # It may know what that does not, and says best why it cannot be read.
        index = _whole_index(prog)
    except Exception as error:  # drgn has one of its own for each way in which the table can be wrong
        if "kallsyms_names" in vmcoreinfo_symbols(prog):
            raise KvirtError(
                f"The kernel's own table of symbols cannot be read ({error}): the dump is truncated or "
                "damaged; give its vmlinux with --symbols, or take the dump again."
            ) from None
        raise KvirtError(
            f"The kernel's symbols cannot be found without its vmlinux ({error}): its VMCOREINFO has to tell "
            "of kallsyms, as Linux 6.0 and later do; give the vmlinux with --symbols."
        ) from None
    return lambda name: iter(index(prog, name, None, False))


def read_kallsyms(prog: drgn.Program) -> SymbolFinder:
    """Read the symbols of a kernel from its own table.

    :returns: a finder for drgn's Program.register_symbol_finder()
    :raises KvirtError: if the kernel does not tell where it is
    """
    return _ByName(_table(prog))


def read_btf(prog: drgn.Program) -> Btf:
    """Read the BTF of a kernel from its memory, where its symbols are known.

    :raises KvirtError: if it has none, or none that can be used
    """
    if _is_here(prog):
        return kernel_btf()
    try:
        # include/asm-generic/vmlinux.lds.h: BOUNDED_SECTION_BY(.BTF, _BTF)
        start, stop = (prog.symbol(name).address for name in ("__start_BTF", "__stop_BTF"))
    except LookupError:
        raise KvirtError(
            "This kernel does not carry its types (it is built without CONFIG_DEBUG_INFO_BTF, or without "
            "CONFIG_KALLSYMS_ALL): give its vmlinux with --symbols."
        ) from None
    if not 0 < stop - start <= _BTF_MAX:
        raise KvirtError(
            f"The kernel's type information should be from {start:#x} to {stop:#x}, which cannot be: "
            "give its vmlinux with --symbols."
        )
    try:
        return Btf(prog.read(start, stop - start))
    except drgn.FaultError as error:
        raise KvirtError(
            f"The kernel's type information cannot be read from its memory ({error}): give its vmlinux with "
            "--symbols."
        ) from None


def _register(prog: drgn.Program, name: str, btf: Btf, index: int) -> None:
    finders = _Finders(prog, btf)
    prog.register_type_finder(name, finders.find_type, enable_index=index)
    prog.register_object_finder(name, finders.find_object, enable_index=index)


def use_btf(prog: drgn.Program, btf: Btf | None = None, symbols: Symbols | None = None) -> None:
    """Have a program find types, objects and symbols in BTF and kallsyms, before it looks elsewhere.

    :param btf: the kernel's, if it is not to be read from the kernel
    :param symbols: those that are known already; others are looked for when they are asked for
    :raises KvirtError: if the kernel does not have what is needed
    """
    finder = _ByName(None if symbols else _table(prog))
    finder.found.update(symbols or {})
    prog.register_symbol_finder(FINDER, finder, enable_index=0)
    prog.cache[_CACHE_KEY] = (btf or read_btf(prog)), finder.found
    _register(prog, FINDER, prog.cache[_CACHE_KEY][0], 0)


def used_btf(prog: drgn.Program) -> tuple[Btf, Symbols]:
    """What a program found after :func:`use_btf`, with which that is done in no time in another process."""
    btf, symbols = prog.cache[_CACHE_KEY]
    return btf, symbols


def use_module_btf(prog: drgn.Program, module: str) -> None:
    """Have a program find the types of a loaded module too, after :func:`use_btf`.

    :param module: its name, with underscores
    :raises KvirtError: if it is not loaded, or is without BTF
    """
    from drgn.helpers.linux.list import list_for_each_entry

    name = f"{FINDER}-{module}"
    if name in prog.registered_type_finders():
        return
    # kernel/bpf/btf.c: btf_modules
    modules = drgn.Object(prog, "struct list_head", address=prog.symbol("btf_modules").address)
    for entry in islice(
        list_for_each_entry("struct btf_module", modules.address_of_(), "list"), _MODULES_MAX
    ):
        btf = entry.btf
        if btf.name.string_().decode(errors="replace") == module:
            data = prog.read(btf.data.value_(), btf.data_size.value_())
            # Behind the kernel's own: a module may have a structure of the same name.
            _register(prog, name, Btf(data, used_btf(prog)[0]), -1)
            return
    raise KvirtError(f"No module {module} with types of its own is loaded in this kernel.")
