# SPDX-License-Identifier: GPL-2.0-only
import pytest

from kvirt.errors import KvirtError
from kvirt.trace.symbols import function_addresses

KALLSYMS = """\
ffffffff81000000 T _text
ffffffff813b5a60 T copy_vma
ffffffff813b5b00 T copy_vma_and_data
ffffffff813b5c00 t __pfx_copy_vma
ffffffff813b6000 t __split_vma
ffffffff813b7000 t try_to_unmap_one.cold
ffffffff813c0000 t page_idle_one
ffffffff813c1000 t page_idle_one
ffffffff823c1000 d vma_complete
ffffffff813d0000 W weak_one
ffffffffc0001000 t rmap_walk_anon\t[some_module]
"""


@pytest.fixture
def kallsyms(tmp_path):
    path = tmp_path / "kallsyms"
    path.write_text(KALLSYMS)
    return path


def test_exact_names_of_functions_of_the_kernel_proper(kallsyms):
    names = ["copy_vma", "__split_vma", "try_to_unmap_one", "vma_complete", "rmap_walk_anon", "weak_one", "."]
    assert function_addresses(names, kallsyms) == {
        "copy_vma": [0xFFFFFFFF813B5A60],
        "__split_vma": [0xFFFFFFFF813B6000],
        "weak_one": [0xFFFFFFFF813D0000],
    }


def test_several_of_one_name(kallsyms):
    assert function_addresses(["page_idle_one"], kallsyms) == {
        "page_idle_one": [0xFFFFFFFF813C0000, 0xFFFFFFFF813C1000]
    }


def test_hidden(kallsyms):
    kallsyms.write_text("0000000000000000 T copy_vma\n0000000000000000 t __split_vma\n")
    with pytest.raises(KvirtError, match=r"sysctl kernel\.kptr_restrict=1"):
        function_addresses(["copy_vma"], kallsyms)
    assert function_addresses(["vma_complete"], kallsyms) == {}


def test_not_there(tmp_path):
    with pytest.raises(KvirtError, match=r"kallsyms cannot be read \(No such file or directory\)"):
        function_addresses(["copy_vma"], tmp_path / "kallsyms")
