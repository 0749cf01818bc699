# SPDX-License-Identifier: GPL-2.0-only
"""The programs of ``kvirt trace``, written for Linux 7.3 with the kernel's headers, as bcc tools are.

Run inside a guest, as root: ``python3 -m kvirt.lab.bench.headers``. It attaches them to the same functions,
prints what they counted so far, and ends. Where kvirt takes offsets and positions from BTF, here the compiler
finds the offsets in headers, and the positions are written down.
"""

from __future__ import annotations

import ctypes

from kvirt.layout_trace import TraceLayout
from kvirt.scheme import Scheme
from kvirt.trace import program, session
from kvirt.trace.environment import load_bcc
from kvirt.trace.hooks import Hooks
from kvirt.trace.symbols import function_addresses

HEADERS = ("linux/mm.h", "linux/rmap.h", "linux/sched.h", "uapi/linux/ptrace.h")
CALLBACKS = (
    *("folio_referenced_one", "try_to_unmap_one", "try_to_migrate_one", "remove_migration_pte"),
    *("page_mkclean_one", "mapping_wrprotect_range_one", "damon_folio_mkold_one", "damon_folio_young_one"),
)
MEMBERS = {
    "KV_VMA_START": ("vm_area_struct", "vm_start"),
    "KV_VMA_END": ("vm_area_struct", "vm_end"),
    "KV_VMA_MM": ("vm_area_struct", "vm_mm"),
    "KV_VMA_FLAGS": ("vm_area_struct", "vm_flags"),
    "KV_VMA_CHAIN": ("vm_area_struct", "anon_vma_chain"),
    "KV_VMA_ANON_VMA": ("vm_area_struct", "anon_vma"),
    "KV_VMA_OPS": ("vm_area_struct", "vm_ops"),
    "KV_VMA_PGOFF": ("vm_area_struct", "vm_pgoff"),
    "KV_VMA_FILE": ("vm_area_struct", "vm_file"),
    "KV_VMA_ANON_LO": ("vm_area_struct", "__vm_anon_pgoff_lo"),
    "KV_VMA_ANON_HI": ("vm_area_struct", "__vm_anon_pgoff_hi"),
    "KV_FOLIO_MAPPING": ("folio", "mapping"),
    "KV_FOLIO_INDEX": ("folio", "index"),
    "KV_ANON_VMA_ROOT": ("anon_vma", "root"),
    "KV_ANON_VMA_CHILDREN": ("anon_vma", "num_children"),
    "KV_RWC_RMAP_ONE": ("rmap_walk_control", "rmap_one"),
    "KV_MM_OWNER": ("mm_struct", "owner"),
    "KV_TASK_TGID": ("task_struct", "tgid"),
    "KV_TASK_PID": ("task_struct", "pid"),
    "KV_TASK_COMM": ("task_struct", "comm"),
    "KV_TASK_LEADER": ("task_struct", "group_leader"),
    **{
        f"KV_REGISTER_ARGUMENT_{i}": ("pt_regs", name)
        for i, name in enumerate(("di", "si", "dx", "cx", "r8", "r9"))
    },
    "KV_REGISTER_RETURN": ("pt_regs", "ax"),
}
WRITTEN_DOWN = {
    "KV_LEGACY": "0",
    "KV_PAGE_SHIFT": "PAGE_SHIFT",
    "KV_VM_SHARED": "VM_SHARED",
    "KV_VM_MAYWRITE": "VM_MAYWRITE",
    "KV_VM_GROWSDOWN": "VM_GROWSDOWN",
    "KV_VM_STACK_SETUP": "VM_STACK_INCOMPLETE_SETUP",
    "KV_VMA_SIZE": "((__builtin_offsetof(struct vm_area_struct,__vm_anon_pgoff_hi)+11)&~7)",
    "KV_REGISTERS_SIZE": "sizeof(struct pt_regs)",
    # mm/vma.h, struct vma_prepare: not among the headers.
    "KV_VP_VMA": "0",
    "KV_VP_INSERT": "40",
}
_ANON = {"folio": 0, "vma": 1, "address": 2}
LAYOUT = TraceLayout(
    scheme=Scheme.ANON_PGOFF,
    constants={},
    arguments={
        "rmap_walk_anon": {"rwc": 1},
        "rmap_walk_ksm": {"rwc": 1},
        "__rmap_walk_file": {"rwc": 4},
        "copy_vma": {"vmap": 0, "addr": 1, "len": 2, "anon_pgoff": 4},
        "__split_vma": {"vma": 1, "addr": 2, "new_below": 3},
        "vma_complete": {"vp": 0},
        "folio_add_new_anon_rmap": _ANON,
        "hugetlb_add_new_anon_rmap": _ANON,
    },
    absent={},
    missing={},
    callbacks=CALLBACKS,
    fprobe=True,
    fprobe_returns=True,
)


def main() -> None:
    """Compile, attach, and print the counters."""
    bcc = load_bcc()
    request = program.Request()
    defined = {name: str(value) for name, value in program.constants(request, LAYOUT).items()} | WRITTEN_DOWN
    for name, (struct, member) in MEMBERS.items():
        defined[name] = f"__builtin_offsetof(struct {struct},{member})"
    text = "".join(f"#include <{header}>\n" for header in HEADERS) + program.text(request, LAYOUT)
    flags = [f"-D{name}={value}" for name, value in defined.items()]
    bpf = bcc.BPF(text=text, cflags=[*session.DIALECT, *flags])
    probes = session.probes(request, LAYOUT)
    found = function_addresses([probe.function for probe in probes])
    addresses = {name: only for name, [only] in found.items()}
    for i, name in enumerate(CALLBACKS):
        bpf["callbacks"][ctypes.c_uint64(addresses[name])] = ctypes.c_uint32(i)
    Hooks(bpf, bcc, LAYOUT.fprobe, LAYOUT.fprobe_returns).attach(probes, addresses)
    print(
        [
            sum(column)
            for column in zip(*(tuple(one.n) for one in bpf["counts"][ctypes.c_int(0)]), strict=True)
        ]
    )


if __name__ == "__main__":
    main()
