# SPDX-License-Identifier: GPL-2.0-only
"""What the programs that trace must know of this kernel, learned from its BTF.

Together with kvirt.layout the only place that asks "does this kernel have ...?". Nothing here needs drgn,
nor debug information: tracing has to start quickly, and on kernels without either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvirt.btf import Btf, Kind, Member, Prototype
from kvirt.errors import KvirtError
from kvirt.scheme import VM_FLAG_BITS, Scheme, detect_scheme

# System V ABI for x86-64, as members of struct pt_regs: the arguments (the others are on the stack, where no
# program looks for them), and what is returned.
_ARGUMENTS, _RETURN = ("di", "si", "dx", "cx", "r8", "r9"), "ax"

_FOLIO, _VMA, _ULONG = "struct folio *", "struct vm_area_struct *", "unsigned long"
# By constant: structure, member, and bytes of it that the programs read (None: its address is all they take).
_STRUCTS: Mapping[str, tuple[str, str, int | None]] = {
    "KV_VMA_START": ("vm_area_struct", "vm_start", 8),
    "KV_VMA_END": ("vm_area_struct", "vm_end", 8),
    "KV_VMA_MM": ("vm_area_struct", "vm_mm", 8),
    "KV_VMA_FLAGS": ("vm_area_struct", "vm_flags", 8),
    "KV_VMA_CHAIN": ("vm_area_struct", "anon_vma_chain", 16),
    "KV_VMA_ANON_VMA": ("vm_area_struct", "anon_vma", 8),
    "KV_VMA_OPS": ("vm_area_struct", "vm_ops", 8),
    "KV_VMA_PGOFF": ("vm_area_struct", "vm_pgoff", 8),
    "KV_VMA_FILE": ("vm_area_struct", "vm_file", 8),
    "KV_FOLIO_MAPPING": ("folio", "mapping", 8),
    "KV_FOLIO_INDEX": ("folio", "index", 8),
    "KV_ANON_VMA_ROOT": ("anon_vma", "root", 8),
    "KV_ANON_VMA_CHILDREN": ("anon_vma", "num_children", 8),
    "KV_RWC_RMAP_ONE": ("rmap_walk_control", "rmap_one", 8),
    "KV_TASK_TGID": ("task_struct", "tgid", 4),
    "KV_TASK_PID": ("task_struct", "pid", 4),
    "KV_TASK_COMM": ("task_struct", "comm", None),
    "KV_TASK_LEADER": ("task_struct", "group_leader", 8),
}
# Without them something cannot be told: by what, then as above.
_OPTIONAL: Mapping[str, Mapping[str, tuple[str, str, int | None]]] = {
    "owner": {"KV_MM_OWNER": ("mm_struct", "owner", 8)},
    "cgroup": {
        "KV_TASK_CGROUPS": ("task_struct", "cgroups", 8),
        "KV_CSS_SET_CGROUP": ("css_set", "dfl_cgrp", 8),
        "KV_CGROUP_LEVEL": ("cgroup", "level", 4),
        "KV_CGROUP_ANCESTORS": ("cgroup", "ancestors", None),
        "KV_CGROUP_KN": ("cgroup", "kn", 8),
        "KV_KN_ID": ("kernfs_node", "id", 8),
    },
    "vma_prepare": {
        "KV_VP_VMA": ("vma_prepare", "vma", 8),
        "KV_VP_INSERT": ("vma_prepare", "insert", 8),
    },
}
_WITHOUT = {
    "owner": "it cannot be told to which process an address space belongs, only which one was running: "
    "build it with CONFIG_MEMCG=y to trace single ones",
    "cgroup": "processes cannot be chosen by their cgroup: build it with CONFIG_CGROUPS=y",
    "vma_prepare": "splits cannot be checked as they happen",
}

_ANON = {"folio": _FOLIO, "vma": _VMA, "address": _ULONG}
_WALK = {"rwc": "struct rmap_walk_control *"}
# By function: its parameters by name, each with its type.
_FUNCTIONS: Mapping[str, Mapping[str, str]] = {
    # Not rmap_walk() and rmap_walk_locked(): where mm/rmap.c itself calls them, compilers inline them.
    "rmap_walk_anon": _WALK,
    "rmap_walk_ksm": _WALK,
    "__rmap_walk_file": _WALK,
    "rmap_walk_file": _WALK,
    "copy_vma": {"vmap": "struct vm_area_struct **", "addr": _ULONG, "len": _ULONG, "pgoff": _ULONG},
    "__split_vma": {"vma": _VMA, "addr": _ULONG, "new_below": "int"},
    "vma_complete": {"vp": "struct vma_prepare *"},
    "folio_add_new_anon_rmap": _ANON,
    "hugetlb_add_new_anon_rmap": _ANON,
}
# include/linux/rmap.h: struct rmap_walk_control, rmap_one
_CALLBACK = (_FOLIO, _VMA, _ULONG, "void *")


@dataclass(frozen=True)
class TraceLayout:
    """What the programs are compiled with, and what they can be attached to."""

    scheme: Scheme
    constants: Mapping[str, int]
    """``-D`` constants by name. Offsets are in bytes; ``KV_VMA_SIZE`` is what to read of a VMA to have all
    of its members, ``KV_VM_...`` are masks of ``vm_flags``."""
    arguments: Mapping[str, Mapping[str, int]]
    """By function: positions of its arguments, from 0, by the names of the parameters. ``anon_pgoff`` is
    that of copy_vma() in either spelling."""
    absent: Mapping[str, str]
    """By function that is not in *arguments*: a sentence that says why."""
    missing: Mapping[str, str]
    """By what this kernel does not have ("owner", "cgroup", "vma_prepare", "callbacks"): a sentence that
    says what cannot be done. The constants that belong to it are not there either."""
    callbacks: tuple[str, ...]
    """Functions that can be the ``rmap_one`` of a walk, sorted; their arguments are folio, vma, address
    and arg."""
    fprobe: bool = False
    """Whether the kernel can have one probe at many functions."""
    fprobe_returns: bool = False
    """Whether such a probe waits for any number of returns; a rethook has room for some only."""


class _Members:
    """Members of the structures of one kernel."""

    def __init__(self, btf: Btf) -> None:
        self._btf = btf
        self._structs: dict[str, tuple[int, ...]] = {}

    def structs(self, name: str) -> tuple[int, ...]:
        if name not in self._structs:
            self._structs[name] = self._btf.named(Kind.STRUCT, name)
        return self._structs[name]

    def find(self, struct: str, path: str, size: int | None) -> int | None:
        """Offset of a member in bytes, None if there is no such structure or member."""
        found = {self._btf.member(i, path) for i in self.structs(struct)} - {None}
        offsets = {self._offset(m, struct, size) for m in found if m is not None}
        if len(offsets) > 1:
            raise KvirtError(
                f"This kernel's BTF has more than one struct {struct}, and they differ in {path}: kvirt will "
                "not guess which one is meant; please report this kernel's version."
            )
        return next(iter(offsets), None)

    def _offset(self, member: Member, struct: str, size: int | None) -> int:
        if member.bit_size is not None or size not in (None, self._btf.sizeof(member.type)):
            raise KvirtError(
                f"Member {member.name} of struct {struct} is not of {size} bytes in this kernel: this "
                "version of kvirt cannot trace it; please report its version."
            )
        return member.offset


def _constants(members: _Members, scheme: Scheme) -> dict[str, int]:
    wanted = dict(_STRUCTS)
    if scheme is not Scheme.LEGACY:
        style = {Scheme.ANON_PGOFF: "anon", Scheme.VIRT_PGOFF: "virt"}[scheme]
        wanted["KV_VMA_ANON_LO"] = ("vm_area_struct", f"__vm_{style}_pgoff_lo", 4)
        wanted["KV_VMA_ANON_HI"] = ("vm_area_struct", f"__vm_{style}_pgoff_hi", 4)
    constants, end = {"KV_LEGACY": int(scheme is Scheme.LEGACY)}, 0
    for name, (struct, path, size) in wanted.items():
        offset = members.find(struct, path, size)
        if offset is None:
            raise KvirtError(
                f"This kernel's BTF has no member {path} of struct {struct}: this version of kvirt cannot "
                "trace such a kernel; please report its version."
            )
        constants[name] = offset
        if struct == "vm_area_struct":
            end = max(end, offset + (size or 0))
    constants["KV_VMA_SIZE"] = (end + 7) & ~7
    return constants


def _optional(members: _Members, constants: dict[str, int]) -> dict[str, str]:
    """Add the constants that a kernel may do without, and return what is missing."""
    missing = {}
    for feature, wanted in _OPTIONAL.items():
        found = {name: members.find(*where) for name, where in wanted.items()}
        lacking = [wanted[name] for name, offset in found.items() if offset is None]
        if lacking:
            struct, path, _ = lacking[0]
            missing[feature] = (
                f"This kernel's BTF has no member {path} of struct {struct}, so that {_WITHOUT[feature]}."
            )
        else:
            constants.update((name, offset) for name, offset in found.items() if offset is not None)
    return missing


def _registers(btf: Btf, members: _Members) -> dict[str, int]:
    names = {f"KV_REGISTER_ARGUMENT_{i}": name for i, name in enumerate(_ARGUMENTS)}
    names["KV_REGISTER_RETURN"] = _RETURN
    found = {constant: members.find("pt_regs", name, 8) for constant, name in names.items()}
    constants = {constant: offset for constant, offset in found.items() if offset is not None}
    if len(constants) < len(found):
        raise KvirtError(
            "This kernel's BTF does not have the registers of x86-64 in struct pt_regs; this version of "
            "kvirt traces x86-64 only."
        )
    constants["KV_REGISTERS_SIZE"] = btf.sizeof(members.structs("pt_regs")[0])
    return constants


def _vm_flags(btf: Btf) -> dict[str, int]:
    def mask(name: str) -> int:
        bit = btf.enumerator(f"VMA_{name}_BIT")
        return 1 << (VM_FLAG_BITS[name] if bit is None else bit)

    return {
        "KV_VM_SHARED": mask("SHARED"),
        "KV_VM_MAYWRITE": mask("MAYWRITE"),
        "KV_VM_GROWSDOWN": mask("GROWSDOWN"),
        # include/linux/mm.h: VM_STACK_INCOMPLETE_SETUP. Its third part, VM_STACK_EARLY, is there only
        # where stacks grow upwards.
        "KV_VM_STACK_SETUP": mask("RAND_READ") | mask("SEQ_READ"),
    }


def _arguments(btf: Btf, function: str, wanted: Mapping[str, str]) -> dict[str, int] | str:
    """Positions of a function's arguments, or the reason why they are not known."""
    types = btf.named(Kind.FUNC, function)
    if not types:
        return (
            f"{function} is not in this kernel's BTF: it was inlined, or this kernel is built without it, so "
            "that it is not known where its arguments are."
        )
    spelled = {btf.declaration(i) for i in types}
    if len(spelled) > 1:
        return f"This kernel has more than one function {function}, with other parameters each."
    declaration = spelled.pop()
    prototype = btf.prototype(types[0])
    parameters = list(_typed(btf, prototype)) if prototype is not None else []
    positions = {}
    for name, type_ in wanted.items():
        if (name, type_) not in parameters:
            return (
                f"{function} of this kernel has no parameter {name} of type {type_} ({declaration}), and "
                "this version of kvirt does not know what it has instead."
            )
        positions[name] = parameters.index((name, type_))
        if positions[name] >= len(_ARGUMENTS):
            return (
                f"{function} of this kernel has its parameter {name} on the stack, not in a register "
                f"({declaration}), where it is not looked for."
            )
    return positions


def _typed(btf: Btf, prototype: Prototype) -> Iterator[tuple[str, str]]:
    """Names and types of parameters; integers without their typedefs, as pgoff_t."""
    for parameter in prototype.parameters:
        plain = btf.resolve(parameter.type)
        integer = btf.kind(plain) == Kind.INT
        yield parameter.name, btf.spell(plain if integer else parameter.type)


def _callbacks(btf: Btf, members: _Members) -> tuple[str, ...] | str:
    """Functions with the prototype that rmap_one points to, or the reason why they cannot be used."""
    found = [btf.member(i, "rmap_one") for i in members.structs("rmap_walk_control")]
    prototype = btf.prototype(found[0].type) if found and found[0] is not None else None
    if prototype is None or tuple(t for _, t in _typed(btf, prototype)) != _CALLBACK:
        return (
            "The functions that rmap walks of this kernel call take other arguments than "
            f"({', '.join(_CALLBACK)}), so that the steps of walks cannot be counted."
        )
    return tuple(btf.functions_like(prototype))


def read_trace_layout(btf: Btf) -> TraceLayout:
    """Learn from a kernel's BTF what tracing needs.

    :raises KvirtError: if kvirt does not know this kind of kernel, if witnesses contradict each other, or if
        the BTF is damaged
    """
    members = _Members(btf)
    vma = members.structs("vm_area_struct")
    if not vma:
        raise KvirtError(
            "This kernel's BTF does not have struct vm_area_struct: boot a kernel whose BTF is whole, as "
            "distributions' kernels have it."
        )
    if btf.pointer_size != 8:
        raise KvirtError("This kernel is not a 64-bit one; this version of kvirt traces x86-64 only.")
    names = [member.name for member in btf.all_members(vma[0])]
    copy_vma = [
        [p.name for p in prototype.parameters]
        for i in btf.named(Kind.FUNC, "copy_vma")
        if (prototype := btf.prototype(i)) is not None
    ]
    scheme = detect_scheme(names, copy_vma[0] if copy_vma else None)
    constants = _constants(members, scheme)
    missing = _optional(members, constants)
    constants.update(_vm_flags(btf))
    constants.update(_registers(btf, members))
    arguments, absent = {}, {}
    for function, wanted in _FUNCTIONS.items():
        if function == "copy_vma" and scheme is not Scheme.LEGACY:
            wanted = {**wanted, scheme.value: _ULONG}
        found = _arguments(btf, function, wanted)
        if isinstance(found, str):
            absent[function] = found
        elif function == "vma_complete" and "vma_prepare" in missing:
            absent[function] = missing["vma_prepare"]
        else:
            if Scheme.VIRT_PGOFF.value in found:
                found["anon_pgoff"] = found.pop(Scheme.VIRT_PGOFF.value)
            arguments[function] = found
    # Where both are there, the one calls the other; mapping_wrprotect_range() calls the inner one too.
    if "__rmap_walk_file" in arguments:
        arguments.pop("rmap_walk_file", None)
        absent.pop("rmap_walk_file", None)
    elif "rmap_walk_file" in arguments:
        del absent["__rmap_walk_file"]
    callbacks = _callbacks(btf, members)
    if isinstance(callbacks, str):
        missing["callbacks"], callbacks = callbacks, ()
    return TraceLayout(
        scheme,
        constants,
        arguments,
        absent,
        missing,
        callbacks,
        fprobe=bool(members.structs("fprobe")),
        # include/linux/fprobe.h: from Linux 6.14 on it is function graph tracing that sees returns.
        fprobe_returns=members.find("fprobe", "hlist_array", 8) is not None,
    )
