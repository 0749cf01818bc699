# SPDX-License-Identifier: GPL-2.0-only
import drgn
import pytest

from kvirt.architecture import check_architecture
from kvirt.errors import KvirtError
from kvirt.layout import arm64_marks, dname_function, swap_type_names
from kvirt.scheme import Scheme, detect_scheme

OLD = ["vm_start", "vm_pgoff", "vm_file"]
# The prototypes of 6.12, 7.2 and 7.3.
COPY_VMA_612 = ["vmap", "addr", "len", "pgoff", "need_rmap_locks"]
COPY_VMA_72 = [*COPY_VMA_612, "keep_source"]
COPY_VMA_73 = ["vmap", "addr", "len", "pgoff", "anon_pgoff", "need_rmap_locks", "keep_source"]


@pytest.mark.parametrize(
    ("members", "copy_vma", "scheme"),
    [
        (OLD, COPY_VMA_612, Scheme.LEGACY),
        (OLD, COPY_VMA_72, Scheme.LEGACY),
        (OLD, None, Scheme.LEGACY),
        ([*OLD, "__vm_anon_pgoff_lo", "__vm_anon_pgoff_hi"], COPY_VMA_73, Scheme.ANON_PGOFF),
        ([*OLD, "__vm_anon_pgoff_lo", "__vm_anon_pgoff_hi"], None, Scheme.ANON_PGOFF),
        (
            [*OLD, "__vm_virt_pgoff_lo", "__vm_virt_pgoff_hi"],
            [p.replace("anon", "virt") for p in COPY_VMA_73],
            Scheme.VIRT_PGOFF,
        ),
    ],
)
def test_scheme_by_members_and_prototype(members, copy_vma, scheme):
    assert detect_scheme(members, copy_vma) is scheme


@pytest.mark.parametrize(
    ("members", "copy_vma", "words"),
    [
        (OLD, COPY_VMA_73, "disagree"),
        ([*OLD, "__vm_anon_pgoff_lo", "__vm_anon_pgoff_hi"], COPY_VMA_72, "disagree"),
        ([*OLD, "__vm_anon_pgoff_lo", "__vm_anon_pgoff_hi"], ["virt_pgoff"], "disagree"),
        (
            [*OLD, "__vm_anon_pgoff_lo", "__vm_anon_pgoff_hi", "__vm_virt_pgoff_lo", "__vm_virt_pgoff_hi"],
            COPY_VMA_73,
            "more than one kind",
        ),
        ([*OLD, "__vm_anon_pgoff_lo"], COPY_VMA_73, "unknown way"),
        ([*OLD, "vm_virt_pgoff"], None, "unknown way"),
    ],
)
def test_contradictions_are_refused(members, copy_vma, words):
    with pytest.raises(KvirtError, match=words):
        detect_scheme(members, copy_vma)


@pytest.mark.parametrize(
    ("max_swapfiles", "hwpoison", "devices"),
    # 7.3 and 6.12 of Debian's cloud flavour, one without memory failure handling, 6.12 with devices.
    [(24, True, 3), (27, True, 0), (28, False, 0), (23, True, 4)],
)
def test_swap_types(max_swapfiles, hwpoison, devices):
    names = swap_type_names(max_swapfiles, hwpoison)
    assert len(names) == 32
    assert names.count("swap") == max_swapfiles
    assert names.count("migration") == 3
    assert names.count("device-private") == (2 if devices else 0)
    assert names.count("device-exclusive") == max(devices - 2, 0)
    assert names[-1] == "marker"
    assert (names[max_swapfiles] == "hwpoison") is hwpoison


def test_errors_of_swapping_in_had_a_type():
    # 6.1 of Debian's cloud flavour: neither memory failure handling nor devices.
    names = swap_type_names(27, False)
    assert names[26:] == ("swap", *["migration"] * 3, "marker", "marker")
    assert swap_type_names(22, True)[22:] == (
        "hwpoison",
        *["migration"] * 3,
        *["device-private"] * 2,
        *["device-exclusive"] * 2,
        "marker",
        "marker",
    )


def test_impossible_swap_types_are_refused():
    with pytest.raises(KvirtError, match="30 swap types"):
        swap_type_names(30, True)


# PAGE_NONE and PAGE_SHARED of arch/arm64/include/asm/pgtable-prot.h, put together by hand: PTE_TYPE_PAGE, AF,
# inner shareable, nG, PXN, UXN; and what marks one that is not valid.
PAGE_SHARED = 3 | 1 << 6 | 1 << 7 | 3 << 8 | 1 << 10 | 1 << 11 | 1 << 51 | 3 << 53
PAGE_NONE = 2 | 1 << 7 | 3 << 8 | 1 << 10 | 1 << 11 | 3 << 53


@pytest.mark.parametrize(
    ("none", "shared", "marks"),
    [
        (PAGE_NONE, PAGE_SHARED, (False, False)),
        (PAGE_NONE | 1 << 58, PAGE_SHARED, (True, False)),
        (PAGE_NONE & ~0x300, PAGE_SHARED & ~0x300, (False, True)),
    ],
)
def test_how_arm64_marks_entries(none, shared, marks):
    assert arm64_marks(none, shared) == marks


@pytest.mark.parametrize(
    ("none", "shared"),
    # PTE_PRESENT_INVALID was bit 59 between two patches of a series; and what means nothing.
    [(PAGE_NONE | 1 << 59, PAGE_SHARED), (0, 0), (PAGE_SHARED, PAGE_SHARED), (PAGE_NONE, PAGE_NONE)],
)
def test_unknown_entries_of_arm64_are_refused(none, shared):
    with pytest.raises(KvirtError, match="unknown kind"):
        arm64_marks(none, shared)


def test_architectures():
    little, wide = drgn.PlatformFlags.IS_LITTLE_ENDIAN, drgn.PlatformFlags.IS_64_BIT
    arch = drgn.Architecture
    assert check_architecture(drgn.Platform(arch.X86_64)) is arch.X86_64
    assert check_architecture(drgn.Platform(arch.AARCH64)) is arch.AARCH64
    for platform, words in (
        (drgn.Platform(arch.S390X), "architecture s390x;"),
        (drgn.Platform(arch.RISCV64), "architecture riscv64;"),
        (drgn.Platform(arch.ARM, little), "architecture arm;"),
        (drgn.Platform(arch.AARCH64, wide), "architecture big-endian aarch64;"),
        (None, "not known which architecture"),
    ):
        with pytest.raises(KvirtError, match=words):
            check_architecture(platform)


def test_functions_that_name_files_are_told_by_their_symbols():
    symbols = {"simple_dname": 0x1000, "sockfs_dname": 0x2000, "pipefs_dname": 0x3000}
    asked = []

    def find(prog, name, address, one):
        asked.append(name)
        at = symbols.get(name)
        binding, kind = drgn.SymbolBinding.GLOBAL, drgn.SymbolKind.FUNC
        return [] if at is None else [drgn.Symbol(name, at, 16, binding, kind)]

    prog = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
    prog.register_symbol_finder("test", find, enable_index=0)
    # What is not needed is not looked for.
    assert dname_function(prog, 0x1000) == "simple_dname"
    assert asked == ["simple_dname"]
    assert dname_function(prog, 0x2000) == "sockfs_dname"
    # Another function, the middle of one, and none.
    assert [dname_function(prog, at) for at in (0x3000, 0x1008, 0)] == [None] * 3
    asked.clear()
    again = [dname_function(prog, at) for at in (0x1000, 0x2000, 0x3000, 0x1008, 0)]
    assert again == ["simple_dname", "sockfs_dname", None, None, None]
    assert asked == []
