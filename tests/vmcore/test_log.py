# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's own words in its log: none on a healthy kernel, and those that are made up are found."""

import pytest

from kvirt.checks.process import ProcessChecker
from kvirt.checks.task import list_vmas
from kvirt.findings import Report
from kvirt.klog import read_log
from kvirt.lab.overlay import Overlay
from kvirt.layout import layout_of, printk_layout
from kvirt.render.table import check_table
from kvirt.tasks import find_process

# It is printed first and long enough to be overlaid with another text of the same length.
BANNER = b"Linux version "
FORMS = {
    "BUG: Bad page map in process {comm}  pte:8000000012345867\n"
    "addr:{address:016x} vm_flags:08100073 anon_vma:0\n"
    "CPU: 0 PID: {pid} Comm: {comm} Not tainted": "addr:",
    "vma {zero:016x} start {address:016x} end {zero:016x} mm {mm:016x}\n"
    "WARNING: CPU: 0 PID: 1 at mm/vma.c:2 x()": "vma ",
    "vma {zero:016x} start {address:016x} end {zero:016x} mm {mm:016x}\n"
    "WARNING: mm/vma.c:2 at x, CPU#0: init/1": "vma ",
}


class Log:
    """The log of a dump, with its first line overlaid."""

    def __init__(self, dump):
        target = dump.opened()
        self.target, self.layout = target, layout_of(target.prog)
        self.how = printk_layout(target.prog)
        self.overlay = Overlay(target.prog)
        self.process = find_process(target.prog, dump.pid)
        _, rows = list_vmas(ProcessChecker(target.prog, self.layout, moves=False), self.process)
        self.vma = next(row.vma for row in rows if row.kind == "anon" and row.vma.anon_vma)

    def say(self, text):
        prog = self.target.prog
        ring = self.how.ring.read(prog, prog.read_u64(self.how.prb))
        data = prog.read(ring["data"], 4096)
        at = data.index(BANNER)
        room = data.index(b"\0", at) - at
        assert len(text) <= room
        self.overlay.write(ring["data"] + at, text.encode().ljust(room))
        return ring

    def read(self):
        return read_log(self.target.prog, self.layout)


@pytest.fixture
def log(dump):
    log = Log(dump)
    yield log
    log.overlay.undo()


def test_a_healthy_kernel_has_nothing_to_say(log):
    said = log.read()
    assert (said.complaints, said.unreadable) == ([], None)


@pytest.mark.parametrize("form", FORMS)
def test_what_the_kernel_says_is_told_with_the_process_and_its_vma(log, form):
    address, process = log.vma.vm_start + 4096, log.process
    text = form.format(comm=process.comm, address=address, pid=process.pid, mm=process.mm, zero=0)
    log.say(text)
    [one] = log.read().complaints
    assert (one.pid, one.address, one.vma) == (process.pid, address, (log.vma.vm_start, log.vma.vm_end))
    headline = next(line for line in text.splitlines() if line.startswith(("BUG", "WARNING")))
    assert one.text[0] == headline
    assert one.text[1].startswith(FORMS[form])
    report = Report()
    said = check_table(log.target, log.layout, report, [], log.read().about([process.pid]))
    assert "complains of memory 1 time" in said
    assert f"in its VMA {log.vma.vm_start:x}-{log.vma.vm_end:x}" in said
    # It may be long ago, and accuses nobody by itself.
    assert report.exit_status(strict=True) == 0


def test_what_names_others_is_counted(log):
    log.say("BUG: Bad rss-counter state mm:0 type:MM_ANONPAGES val:5 Comm:nobody Pid:4000000")
    [one] = log.read().complaints
    assert (one.pid, one.tid, one.comm) == (None, 4000000, "nobody")
    mine = log.read().about([log.process.pid])
    assert (mine.complaints, mine.others) == ([], 1)


def test_what_a_user_wrote_is_not_the_kernels_word(log):
    text = next(iter(FORMS)).format(comm="x", address=0x1000, pid=1, mm=0, zero=0)
    ring = log.say(text)
    prog = log.target.prog
    # The first line's; a new ring's tail is a descriptor that was never used.
    first = ring["tail_id"] + 1 & ((1 << ring["count_bits"]) - 1)
    info = ring["infos"] + first * log.how.info.size
    assert prog.read_u8(info + log.how.info.offset("facility")) == 0
    log.overlay.write(info + log.how.info.offset("facility"), b"\1")
    assert log.read().complaints == []
