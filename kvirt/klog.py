# SPDX-License-Identifier: GPL-2.0-only
"""What the kernel itself said of its memory: the warnings in a dump's log, and whom they name.

Only what the kernel printed is believed: lines that somebody wrote to /dev/kmsg have another facility.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import drgn
from drgn.helpers.linux.pid import find_task

from kvirt.errors import KvirtError
from kvirt.layout import Layout, PrintkLayout, printk_layout
from kvirt.mm.address_space import read_address_space
from kvirt.tasks import for_each_process

# include/linux/syslog.h, kernel/printk/printk_ringbuffer.h: LOG_KERN, states of descriptors, DESC_ID_MASK
_LOG_KERN = 0
_COMMITTED, _FINALIZED = 1, 2
_STATE_SHIFT = 62
_ID_MASK = (1 << _STATE_SHIFT) - 1
# kernel/printk/printk.c: printk_caller_id()
_CALLER_IS_CPU = 1 << 31
# Rings larger than these are damage: LOG_BUF_LEN_MAX, and a descriptor for each 32 bytes of text.
_TEXT_BITS_MAX, _COUNT_BITS_MAX = 31, 26
# More complaints than these are counted only.
_COMPLAINTS_MAX = 1000
# Lines that belong to one complaint, how long it may take to print them, and how many are shown.
_LINES_MAX = 200
_NANOSECONDS_MAX = 2_000_000_000
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of the kernel's log."""

    nanoseconds: int
    """Since boot."""
    caller: int
    """The thread that printed it, or a processor with bit 31 set."""
    text: str

    @property
    def tid(self) -> int | None:
        """The thread that printed it; None in an interrupt."""
        return None if self.caller & _CALLER_IS_CPU else self.caller


@dataclass(slots=True)
class Complaint:
    """A warning about memory. What it does not tell is None."""

    nanoseconds: int
    """Since boot."""
    text: list[str] = field(default_factory=list)
    """Its first line and the most telling others."""
    tid: int | None = None
    """The thread that it happened in."""
    comm: str | None = None
    """That thread's name, as printed."""
    address: int | None = None
    mm: int | None = None
    """Address of the ``struct mm_struct``."""
    pid: int | None = None
    """The process, if there still is one."""
    vma: tuple[int, int] | None = None
    """Start and end of that process's VMA."""


@dataclass(slots=True)
class KernelLog:
    """What the log says."""

    complaints: list[Complaint] = field(default_factory=list)
    omitted: int = 0
    """Complaints that were not kept, because there are so many."""
    others: int = 0
    """Those left out by :meth:`about`."""
    unreadable: str | None = None
    """A sentence: why it could not be read."""

    def about(self, pids: Iterable[int]) -> KernelLog:
        """Those that name one of some processes."""
        wanted = set(pids)
        kept = [one for one in self.complaints if one.pid in wanted]
        others = len(self.complaints) - len(kept)
        return KernelLog(kept, self.omitted, others, self.unreadable)


# Where a WARN() or BUG() has to stand to be about memory.
_FILES = (
    r"(?:\.{1,2}/)*(?:mm/|arch/\w+/mm/|arch/\w+/include/asm/pg|fs/(?:exec|userfaultfd|hugetlbfs/inode)\.c|"
    r"kernel/(?:fork|events/uprobes)\.c|include/(?:linux|asm-generic)/(?:mm|rmap|pg|page|huge|swap|leafops|"
    r"maple|interval|ksm|memcontrol|userfaultfd))"
)
# First lines. __warn() in kernel/panic.c, before and since 6.18; __report_bug() in lib/bug.c; pmd_ERROR() in
# include/asm-generic; print_bad_page_map() in mm/memory.c, bad_page() in mm/page_alloc.c, check_mm() in
# kernel/fork.c.
_HEADLINE = re.compile(
    rf"WARNING: (?:CPU: \d+ PID: (?P<pid>\d+) at )?(?:\[.*?\] )?{_FILES}\S*:\d+ "
    r"(?:.*, CPU#\d+: (?P<who>.+)/(?P<tid>\d+)$)?"
    rf"|kernel BUG at {_FILES}\S*:\d+!"
    rf"|{_FILES}\S*:\d+: bad p[g4um]?[dt]e? "
    r"|BUG: (?:Bad (?:page|rss-counter|swap)|non-zero pgtables_bytes)"
)
_CUT_HERE = re.compile(r"-+\[ cut here \]-+$")
_END = re.compile(r"---\[ end ")
# What dump_page(), dump_vma() and dump_mm() in mm/debug.c begin with; VM_WARN_ON_ONCE_VMA() and its kin dump
# before they warn.
_DUMP = re.compile(
    r"(?:page:\s?\S* ?refcount:|vma [0-9a-f]{16} start |mm [0-9a-f]{16} task_size |vmg [0-9a-f]{16} )"
)
_STACK = re.compile(r"(?:CPU: \d+ .*Comm: |Call [Tt]race:)")
_TELLING = re.compile(
    r"(?:page:|page dumped because: |head:|vma |prot |pgoff |flags: |mm [0-9a-f]{16} |vmg |addr:|pgd:|file:)"
)
# dump_stack_print_info(), lib/dump_stack.c; check_mm()
_PID_COMM = re.compile(
    r"CPU: \d+ (?:UID: \d+ )?PID: (\d+) Comm: (.+?) (?:Kdump: loaded )?(?:Not tainted|Tainted: )"
)
_COMM_PID = re.compile(r"Comm:(.+) Pid:(\d+)$")
_IN_PROCESS = re.compile(r"in process (.+?)  (?:pgd|p4d|pud|pmd|pte|pfn):")
_ADDR = re.compile(r"addr:([0-9a-f]{16}) ")
_VMA = re.compile(r"vma [0-9a-f]{16} start ([0-9a-f]{16}) end [0-9a-f]{16} mm ([0-9a-f]{16})")
_MM = re.compile(r"mm ([0-9a-f]{16}) task_size ")


class _Reader:
    """Puts together what one complaint is, of the lines of one caller."""

    def __init__(self, first: LogLine) -> None:
        self.complaint = Complaint(first.nanoseconds, tid=first.tid)
        self.headed = False
        self.in_stack = False
        self._lines = 0

    def takes(self, line: LogLine) -> bool:
        """Whether a line belongs here."""
        if line.nanoseconds - self.complaint.nanoseconds > _NANOSECONDS_MAX or self._lines >= _LINES_MAX:
            return False
        if _HEADLINE.match(line.text):
            return not self.headed
        return not (self.in_stack and (_DUMP.match(line.text) or _CUT_HERE.match(line.text)))

    def add(self, line: LogLine) -> None:
        """Take what a line tells."""
        one, text = self.complaint, line.text
        self._lines += 1
        headline = _HEADLINE.match(text)
        if headline:
            self.headed = True
            one.text.insert(0, text)
            if headline["pid"]:
                one.tid = int(headline["pid"])
            if headline["tid"]:
                one.tid, one.comm = int(headline["tid"]), headline["who"]
        elif _TELLING.match(text) and not self.in_stack and len(one.text) < _SHOWN:
            one.text.append(text)
        self.in_stack |= bool(_STACK.match(text))
        self._name(text)

    def _name(self, text: str) -> None:
        one = self.complaint
        if match := _PID_COMM.match(text):
            one.tid, one.comm = int(match[1]), match[2]
        elif match := _COMM_PID.search(text):
            one.comm, one.tid = match[1], int(match[2])
        elif match := _IN_PROCESS.search(text):
            one.comm = match[1]
        elif match := _ADDR.match(text):
            one.address = int(match[1], 16)
        elif match := _VMA.match(text):
            one.address, one.mm = int(match[1], 16), int(match[2], 16)
        elif match := _MM.match(text):
            one.mm = int(match[1], 16)


def find_complaints(lines: Iterable[LogLine]) -> Iterator[Complaint]:
    """Find the warnings about memory in a log, in the order of their first lines.

    Callers print at the same time: the lines of each are put together.

    :param lines: those of the kernel alone
    """
    order: list[_Reader] = []
    now: dict[int, _Reader] = {}
    for line in lines:
        reader = now.get(line.caller)
        if reader is not None and not reader.takes(line):
            del now[line.caller]
            reader = None
        if reader is None and (_HEADLINE.match(line.text) or _DUMP.match(line.text)):
            reader = now[line.caller] = _Reader(line)
            order.append(reader)
        if reader is not None:
            reader.add(line)
            if _END.match(line.text):
                del now[line.caller]
    # A page that was only dumped was asked for, or its warning is lost.
    return (reader.complaint for reader in order if reader.headed)


def read_lines(prog: drgn.Program, how: PrintkLayout) -> Iterator[LogLine]:
    """The lines of the log that the kernel itself printed, oldest first (kernel/printk/printk_ringbuffer.c).

    :raises drgn.FaultError: if it cannot be read
    :raises KvirtError: if it is damaged
    """
    ring = how.ring.read(prog, prog.read_u64(how.prb))
    if not 0 < ring["count_bits"] <= _COUNT_BITS_MAX or not 0 < ring["size_bits"] <= _TEXT_BITS_MAX:
        raise KvirtError("it is damaged")
    count, size = 1 << ring["count_bits"], 1 << ring["size_bits"]
    descs = prog.read(ring["descs"], count * how.desc.size)
    infos = prog.read(ring["infos"], count * how.info.size)
    data = prog.read(ring["data"], size)
    used = (ring["head_id"] - ring["tail_id"] & _ID_MASK) + 1
    if used > count:
        raise KvirtError("it is damaged")
    told = 0
    for id_ in range(ring["tail_id"], ring["tail_id"] + used):
        at = id_ & (count - 1)
        desc = how.desc.decode(descs[at * how.desc.size : (at + 1) * how.desc.size])
        state = desc["state_var"] >> _STATE_SHIFT
        if desc["state_var"] & _ID_MASK != id_ & _ID_MASK or state not in (_COMMITTED, _FINALIZED):
            continue
        told += 1
        begin, end = desc["begin"], desc["next"]
        if begin & 1 or end & 1:
            # A line without text.
            continue
        # get_data(): a block that would not fit at the end is at the beginning instead; its ID comes first.
        first = begin & (size - 1) if begin >> ring["size_bits"] == end >> ring["size_bits"] else 0
        info = how.info.decode(infos[at * how.info.size : (at + 1) * how.info.size])
        last = min(first + 8 + info["text_len"], size if first else end & (size - 1) or size)
        if info["facility"] == _LOG_KERN:
            for text in data[first + 8 : last].decode(errors="backslashreplace").splitlines():
                yield LogLine(info["ts_nsec"], info["caller_id"], text.rstrip())
    if not told:
        # Every kernel has said something.
        raise KvirtError("it is damaged")


def _connect(prog: drgn.Program, layout: Layout, complaints: list[Complaint]) -> None:
    """Find the process and the VMA that each complaint names."""
    owners: dict[int, int] | None = None
    for one in complaints:
        mm = one.mm
        if mm is not None:
            if owners is None:
                owners = {p.mm: p.pid for p in for_each_process(prog, moves=False).found}
            one.pid = owners.get(mm)
        elif one.tid:
            task = find_task(prog, one.tid)
            # The number may be somebody else's by now.
            if task and (
                one.comm is None or task.comm.string_().decode(errors="backslashreplace") == one.comm
            ):
                mm = task.mm.value_() or None
                one.pid = None if mm is None else task.tgid.value_()
        if one.pid is None or mm is None or one.address is None:
            continue
        space = read_address_space(prog, layout, mm, at=frozenset({one.address}))
        for vma in space.vmas():
            if vma.vm_start <= one.address < vma.vm_end:
                one.vma = vma.vm_start, vma.vm_end


def read_log(prog: drgn.Program, layout: Layout) -> KernelLog:
    """What the log of a dump says of memory, and of whom. Whatever cannot be read is a sentence."""
    log = KernelLog()
    try:
        how = printk_layout(prog)
        if how is None:
            log.unreadable = (
                "The kernel's log cannot be found, because the type information or the symbols lack what it "
                "needs: give the vmlinux with --symbols."
            )
            return log
        found = list(find_complaints(read_lines(prog, how)))
    except (drgn.FaultError, KvirtError, ValueError, OverflowError, struct.error) as error:
        log.unreadable = f"The kernel's log cannot be read ({error}): the dump may lack it."
        return log
    log.complaints, log.omitted = found[:_COMPLAINTS_MAX], len(found[_COMPLAINTS_MAX:])
    try:
        _connect(prog, layout, log.complaints)
    except (drgn.FaultError, LookupError, ValueError) as error:
        log.unreadable = (
            f"It is not known whom all of the kernel's log is about ({error}): the dump may lack it."
        )
    return log
