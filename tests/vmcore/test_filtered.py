# SPDX-License-Identifier: GPL-2.0-only
"""Pages that makedumpfile would have left out of a dump: nothing is held to be wrong for it."""

import drgn
import pytest
from drgn.helpers.linux.mm import follow_phys, phys_to_virt

from kvirt.checks.process import ProcessChecker
from kvirt.checks.task import check_task
from kvirt.findings import Report, Severity
from kvirt.lab.damage import Scene
from kvirt.layout import layout_of
from kvirt.memory import PAGE_BYTES, core_of
from kvirt.tasks import find_process


def leave_out(prog, address):
    """Have the page with a kernel address be read as in a kdump-compressed dump that lacks it."""

    def refuse(at, count, offset, physical):
        raise drgn.FaultError("Excluded page", at)

    physical = follow_phys(prog["init_mm"].address_of_(), address).value_() & -PAGE_BYTES
    prog.add_memory_segment(address & -PAGE_BYTES, PAGE_BYTES, refuse)
    prog.add_memory_segment(physical, PAGE_BYTES, refuse, physical=True)
    core_of(prog).hide(physical, PAGE_BYTES)


def places(scene):
    """Addresses of what is on the way to the verdict on a process, by what it is."""
    space, prog = scene.space, scene.prog
    page = scene.page("small anonymous page")
    link = space.chains[page.vma.address].links[-1]
    mapped = next(v for v in space.vmas() if v.vm_file and space.file(v) is not None)
    root = drgn.Object(prog, "struct mm_struct", address=space.address).mm_mt.ma_root
    return {
        "mm_struct": space.address,
        "maple node": root.value_() & ~255,
        "vm_area_struct": page.vma.address,
        "anon_vma_chain": link.address,
        "anon_vma": link.anon_vma,
        "file": mapped.vm_file,
        "mapping": space.file(mapped).f_mapping,
        "pgd": space.pgd,
        "page table": phys_to_virt(prog, page_table(scene, page.address)).value_(),
        "struct page": scene.page_address(page.pfn),
    }


def page_table(scene, address):
    """Physical address of the table in which the page at an address has its entry."""
    tables = scene.layout.pgtable
    entry = scene.prog.read_u64(scene.space.pgd + tables.slot(address, tables.levels - 1))
    for level in range(tables.levels - 2, 0, -1):
        entry = scene.prog.read_u64(tables.physical(entry) + tables.slot(address, level), physical=True)
    return tables.physical(entry)


KINDS = (
    "mm_struct",
    "maple node",
    "vm_area_struct",
    "anon_vma_chain",
    "anon_vma",
    "file",
    "mapping",
    "pgd",
    "page table",
    "struct page",
)


# Without these the memory map has holes; of what hangs on it without the others, the rest is judged.
MEMORY_MAP = KINDS[:5]


@pytest.mark.parametrize("kind", KINDS)
def test_what_lacks_a_page_is_not_wrong(dump, kind):
    prog = dump.open().prog
    process = find_process(prog, dump.pid)
    leave_out(prog, places(Scene(prog, process.mm))[kind])
    checker = ProcessChecker(prog, layout_of(prog), moves=False)
    report = Report()
    report.add(check_task(checker, process))
    assert report.summary()[Severity.ERROR] == 0, report.findings()
    assert report.exit_status() == 3
    assert report.processes == (kind not in MEMORY_MAP)
    assert any("cannot be read" in said or "the dump lacks" in said for said in report.incomplete)
