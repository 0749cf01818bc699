# SPDX-License-Identifier: GPL-2.0-only
import subprocess
import sys

import pytest

from kvirt.btf import Btf
from kvirt.errors import KvirtError
from kvirt.layout_trace import TraceLayout, read_trace_layout
from kvirt.scheme import Scheme

from .btf_assembler import SIGNED, Assembler

REGISTERS = {"r9": 64, "r8": 72, "ax": 80, "cx": 88, "dx": 96, "si": 104, "di": 112}
COPY_VMA = ("vmap", "addr", "len", "pgoff", "need_rmap_locks")


class Kernel:
    """BTF of a kernel like those that there are, or not quite."""

    def __init__(
        self,
        styles: tuple[str, ...] = ("anon",),
        copy_vma: tuple[str, ...] | None = None,
        without: tuple[str, ...] = (),
        flags: tuple[tuple[str, int], ...] = (),
        rmap_one: str = "folio",
        level: str = "int",
        fprobe: str = "",
    ) -> None:
        self.a = a = Assembler()
        self.without = without
        self.int = a.int("int", 4, SIGNED)
        self.uint = a.int("unsigned int", 4)
        self.ulong = a.int("long unsigned int", 8)
        self.pgoff_t = a.add(8, "pgoff_t", self.ulong)
        self.types = {"int": self.int, "ulong": self.ulong, "bool": a.int("_Bool", 1, 4 << 24)}
        self.types["ptr"] = a.ptr(0)
        self.types["list"] = a.struct("list_head", 16, [])
        self.types["comm"] = a.array(a.int("char", 1, SIGNED), 16)
        self.types["flex"] = a.array(self.types["ptr"], 0)
        self.types["lo"] = self.uint
        self.members(styles, rmap_one, level)
        if fprobe:
            self.struct("fprobe", 64, ("nmissed", "ulong", 0), (fprobe, "ptr", 48))
        if copy_vma is None:
            copy_vma = (*COPY_VMA[:4], *(f"{style}_pgoff" for style in styles), *COPY_VMA[4:])
        self.functions(copy_vma)
        a.enum("", [(f"VMA_{name}_BIT", bit) for name, bit in flags])

    def struct(self, name: str, size: int, *members: tuple[str, str, int]) -> int:
        chosen = [(n, self.types[t], 8 * o) for n, t, o in members if f"{name}.{n}" not in self.without]
        return self.a.struct(name, size, chosen)

    def members(self, styles: tuple[str, ...], rmap_one: str, level: str) -> None:
        a, p = self.a, "ptr"
        range_ = a.struct("", 16, [("vm_start", self.ulong, 0), ("vm_end", self.ulong, 64)])
        self.types["either"] = a.union("", 16, [("", range_, 0), ("vm_freeptr", self.types[p], 0)])
        offsets = [
            (f"__vm_{s}_pgoff_{half}", "lo", at) for s in styles for half, at in (("lo", 44), ("hi", 132))
        ]
        vma = self.struct(
            "vm_area_struct",
            192,
            ("", "either", 0),
            *(("vm_mm", p, 16), ("vm_flags", "ulong", 32), *offsets, ("anon_vma_chain", "list", 48)),
            *(("anon_vma", p, 64), ("vm_ops", p, 72), ("vm_pgoff", "ulong", 80), ("vm_file", p, 88)),
        )
        folio = self.struct("folio", 256, ("mapping", p, 24), ("index", "ulong", 32))
        page = self.struct("page", 64, ("mapping", p, 24))
        self.vma_p, self.folio_p = a.ptr(vma), a.ptr(folio)
        first = {"folio": self.folio_p, "page": a.ptr(page)}[rmap_one]
        words = [("", first), ("", self.vma_p), ("", self.ulong), ("", self.types[p])]
        self.types["callback"] = a.ptr(a.proto(self.types["bool"], words))
        rwc = self.struct("rmap_walk_control", 40, ("arg", p, 0), ("rmap_one", "callback", 16))
        self.rwc_p = a.ptr(rwc)
        self.struct("anon_vma", 96, ("root", p, 0), ("num_children", "ulong", 48))
        tgid = (("pid", "int", 2000), ("tgid", "int", 2004), ("group_leader", p, 2040))
        self.struct("task_struct", 4096, *tgid, ("comm", "comm", 2100), ("cgroups", p, 2200))
        self.struct("mm_struct", 2048, ("owner", p, 1528))
        self.struct("pt_regs", 168, *((n, "ulong", at) for n, at in REGISTERS.items()))
        self.struct("css_set", 600, ("dfl_cgrp", p, 128))
        self.struct("cgroup", 2400, ("level", level, 256), ("kn", p, 296), ("ancestors", "flex", 2352))
        self.struct("kernfs_node", 128, ("id", "ulong", 96))
        if "vma_prepare" not in self.without:
            self.vp_p = a.ptr(self.struct("vma_prepare", 72, ("vma", p, 0), ("insert", p, 40)))
        else:
            self.vp_p = a.ptr(a.add(7, "vma_prepare", 0))

    def func(self, name: str, returns: int, *parameters: tuple[str, int]) -> None:
        if name not in self.without:
            self.a.func(name, returns, parameters)

    def functions(self, copy_vma: tuple[str, ...]) -> None:
        types = {"vmap": self.a.ptr(self.vma_p), "pgoff": self.pgoff_t}
        self.func("copy_vma", self.vma_p, *((n, types.get(n, self.ulong)) for n in copy_vma))
        split = (
            ("vmi", self.types["ptr"]),
            ("vma", self.vma_p),
            ("addr", self.ulong),
            ("new_below", self.int),
        )
        self.func("__split_vma", self.int, *split)
        for name in ("rmap_walk_anon", "rmap_walk_ksm"):
            self.func(name, 0, ("folio", self.folio_p), ("rwc", self.rwc_p))
        inner = (("folio", self.folio_p), ("mapping", self.types["ptr"]), ("rwc", self.rwc_p))
        self.func("__rmap_walk_file", 0, *inner)
        self.func("vma_complete", 0, ("vp", self.vp_p), ("vmi", self.types["ptr"]))
        anon = (("folio", self.folio_p), ("vma", self.vma_p), ("address", self.ulong), ("flags", self.int))
        self.func("folio_add_new_anon_rmap", 0, *anon)
        self.func("hugetlb_add_new_anon_rmap", 0, *anon[:3])
        one = (("folio", self.folio_p), ("vma", self.vma_p), ("addr", self.ulong), ("arg", self.types["ptr"]))
        self.func("try_to_unmap_one", self.types["bool"], *one)
        self.func("folio_referenced_one", self.types["bool"], *one)
        self.func("page_vma_mkclean_one", self.int, *one)

    def layout(self) -> TraceLayout:
        return read_trace_layout(Btf(self.a.finish()))


def test_anon_pgoff():
    layout = Kernel().layout()
    assert layout.scheme is Scheme.ANON_PGOFF
    assert layout.constants == {
        "KV_LEGACY": 0,
        "KV_VMA_SIZE": 136,
        "KV_VMA_START": 0,
        "KV_VMA_END": 8,
        "KV_VMA_MM": 16,
        "KV_VMA_FLAGS": 32,
        "KV_VMA_ANON_LO": 44,
        "KV_VMA_CHAIN": 48,
        "KV_VMA_ANON_VMA": 64,
        "KV_VMA_OPS": 72,
        "KV_VMA_PGOFF": 80,
        "KV_VMA_FILE": 88,
        "KV_VMA_ANON_HI": 132,
        "KV_FOLIO_MAPPING": 24,
        "KV_FOLIO_INDEX": 32,
        "KV_ANON_VMA_ROOT": 0,
        "KV_ANON_VMA_CHILDREN": 48,
        "KV_RWC_RMAP_ONE": 16,
        "KV_MM_OWNER": 1528,
        "KV_TASK_TGID": 2004,
        "KV_TASK_PID": 2000,
        "KV_TASK_COMM": 2100,
        "KV_TASK_LEADER": 2040,
        "KV_TASK_CGROUPS": 2200,
        "KV_CSS_SET_CGROUP": 128,
        "KV_CGROUP_LEVEL": 256,
        "KV_CGROUP_ANCESTORS": 2352,
        "KV_CGROUP_KN": 296,
        "KV_KN_ID": 96,
        "KV_VP_VMA": 0,
        "KV_VP_INSERT": 40,
        "KV_VM_SHARED": 0x8,
        "KV_VM_MAYWRITE": 0x20,
        "KV_VM_GROWSDOWN": 0x100,
        "KV_VM_STACK_SETUP": 0x18000,
        "KV_REGISTERS_SIZE": 168,
        "KV_REGISTER_RETURN": 80,
        **{f"KV_REGISTER_ARGUMENT_{i}": at for i, at in enumerate((112, 104, 96, 88, 72, 64))},
    }
    anon = {"folio": 0, "vma": 1, "address": 2}
    assert layout.arguments == {
        "rmap_walk_anon": {"rwc": 1},
        "rmap_walk_ksm": {"rwc": 1},
        "__rmap_walk_file": {"rwc": 2},
        "copy_vma": {"vmap": 0, "addr": 1, "len": 2, "pgoff": 3, "anon_pgoff": 4},
        "__split_vma": {"vma": 1, "addr": 2, "new_below": 3},
        "vma_complete": {"vp": 0},
        "folio_add_new_anon_rmap": anon,
        "hugetlb_add_new_anon_rmap": anon,
    }
    assert layout.absent == {}
    assert layout.missing == {}
    assert layout.callbacks == ("folio_referenced_one", "try_to_unmap_one")


def test_registers_of_another_architecture_are_refused():
    with pytest.raises(KvirtError, match="x86-64 only"):
        Kernel(without=("pt_regs.di",)).layout()


def test_virt_pgoff_has_the_same_names():
    anon, virt = Kernel().layout(), Kernel(styles=("virt",)).layout()
    assert virt.scheme is Scheme.VIRT_PGOFF
    assert virt.constants == anon.constants
    assert virt.arguments == anon.arguments


def test_legacy_has_one_offset():
    layout = Kernel(styles=()).layout()
    assert layout.scheme is Scheme.LEGACY
    assert layout.constants["KV_LEGACY"] == 1
    assert layout.constants["KV_VMA_SIZE"] == 96
    assert not {"KV_VMA_ANON_LO", "KV_VMA_ANON_HI"} & set(layout.constants)
    assert layout.arguments["copy_vma"] == {"vmap": 0, "addr": 1, "len": 2, "pgoff": 3}


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ({"styles": ("anon", "virt")}, "more than one kind"),
        ({"styles": (), "copy_vma": (*COPY_VMA, "anon_pgoff")}, "disagree"),
        ({"copy_vma": COPY_VMA}, "disagree"),
        ({"without": ("vm_area_struct.vm_file",)}, "no member vm_file of struct vm_area_struct"),
        ({"without": ("folio.index",)}, "no member index of struct folio"),
        ({"level": "ulong"}, "level of struct cgroup is not of 4 bytes"),
    ],
)
def test_unknown_kernels_are_refused(kernel, words):
    with pytest.raises(KvirtError, match=words):
        Kernel(**kernel).layout()


def test_btf_without_vmas_is_refused():
    a = Assembler()
    a.int("int", 4)
    with pytest.raises(KvirtError, match="does not have struct vm_area_struct"):
        read_trace_layout(Btf(a.finish()))


def test_structures_that_differ_are_refused():
    kernel = Kernel()
    kernel.struct("anon_vma", 96, ("root", "ptr", 0), ("num_children", "ulong", 48))
    assert kernel.layout().constants["KV_ANON_VMA_CHILDREN"] == 48
    kernel.struct("anon_vma", 96, ("root", "ptr", 0), ("num_children", "ulong", 56))
    with pytest.raises(KvirtError, match="more than one struct anon_vma"):
        kernel.layout()


def test_flags_are_those_of_the_kernel():
    flags = (("SHARED", 40), ("MAYWRITE", 41), ("GROWSDOWN", 42), ("RAND_READ", 43), ("SEQ_READ", 44))
    constants = Kernel(flags=flags).layout().constants
    masks = {name: value for name, value in constants.items() if name.startswith("KV_VM_")}
    assert masks == {
        "KV_VM_SHARED": 1 << 40,
        "KV_VM_MAYWRITE": 1 << 41,
        "KV_VM_GROWSDOWN": 1 << 42,
        "KV_VM_STACK_SETUP": 1 << 43 | 1 << 44,
    }


@pytest.mark.parametrize(
    ("without", "feature", "lost"),
    [
        ("mm_struct.owner", "owner", {"KV_MM_OWNER"}),
        (
            "cgroup.ancestors",
            "cgroup",
            {
                *("KV_TASK_CGROUPS", "KV_CSS_SET_CGROUP", "KV_CGROUP_LEVEL", "KV_CGROUP_ANCESTORS"),
                *("KV_CGROUP_KN", "KV_KN_ID"),
            },
        ),
    ],
)
def test_what_a_kernel_may_do_without(without, feature, lost):
    layout = Kernel(without=(without,)).layout()
    assert set(Kernel().layout().constants) - set(layout.constants) == lost
    assert set(layout.missing) == {feature}
    struct, member = without.split(".")
    assert layout.missing[feature].startswith(f"This kernel's BTF has no member {member} of struct {struct}")
    assert layout.absent == {}


def test_without_vma_prepare_no_split_is_checked():
    layout = Kernel(without=("vma_prepare",)).layout()
    assert not {"KV_VP_VMA", "KV_VP_INSERT"} & set(layout.constants)
    assert layout.absent == {"vma_complete": layout.missing["vma_prepare"]}
    assert "__split_vma" in layout.arguments


@pytest.mark.parametrize("function", ["copy_vma", "rmap_walk_ksm", "hugetlb_add_new_anon_rmap"])
def test_functions_that_are_not_there(function):
    layout = Kernel(without=(function,)).layout()
    assert set(layout.absent) == {function}
    assert layout.absent[function].startswith(f"{function} is not in this kernel's BTF")
    assert function not in layout.arguments
    assert layout.scheme is Scheme.ANON_PGOFF


def test_functions_with_other_parameters():
    kernel = Kernel(without=("__split_vma", "rmap_walk_anon", "folio_add_new_anon_rmap"))
    fillers = [(f"x{n}", kernel.int) for n in range(5)]
    kernel.a.func("__split_vma", kernel.int, [*fillers[:3], ("vma", kernel.vma_p), ("addr", kernel.ulong)])
    kernel.a.func("rmap_walk_anon", 0, [*fillers, ("folio", kernel.folio_p), ("rwc", kernel.rwc_p)])
    for name in ("folio", "page"):
        kernel.a.func("folio_add_new_anon_rmap", 0, [(name, kernel.folio_p)])
    absent = kernel.layout().absent
    assert "no parameter new_below of type int (int __split_vma(int x0," in absent["__split_vma"]
    assert "has its parameter rwc on the stack" in absent["rmap_walk_anon"]
    assert "more than one function" in absent["folio_add_new_anon_rmap"]


def test_walks_of_files_have_one_name_or_another():
    def layout(*without):
        kernel = Kernel(without=without)
        if "rmap_walk_file" not in without:
            kernel.a.func("rmap_walk_file", 0, [("folio", kernel.folio_p), ("rwc", kernel.rwc_p)])
        return kernel.layout()

    outer, inner = "rmap_walk_file", "__rmap_walk_file"
    assert (layout().arguments[inner], layout().absent) == ({"rwc": 2}, {})
    assert outer not in layout().arguments
    assert (layout(inner).arguments[outer], layout(inner).absent) == ({"rwc": 1}, {})
    assert set(layout(outer, inner).absent) == {outer, inner}


def test_callbacks_that_take_pages():
    layout = Kernel(rmap_one="page").layout()
    assert layout.callbacks == ()
    assert "take other arguments" in layout.missing["callbacks"]


@pytest.mark.parametrize(
    ("member", "fprobe", "fprobe_returns"),
    [("", False, False), ("rethook", True, False), ("hlist_array", True, True)],
)
def test_one_probe_of_many_functions(member, fprobe, fprobe_returns):
    layout = Kernel(fprobe=member).layout()
    assert (layout.fprobe, layout.fprobe_returns) == (fprobe, fprobe_returns)


def test_neither_drgn_nor_numpy_is_needed():
    code = "import sys, kvirt.layout_trace; print({'drgn', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
