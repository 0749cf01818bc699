# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's complaints, in the forms that its versions have."""

import struct

import pytest

from kvirt.errors import KvirtError
from kvirt.klog import LogLine, find_complaints, read_lines
from kvirt.layout import Member, PrintkLayout, StructLayout
from tests.unit.fake import Memory

# print_bad_page_map() of 7.3, with its page and stack.
BAD_PAGE_MAP = """\
BUG: Bad page map in process my prog  pte:8000000012345867
pgd:100000067 p4d:100000067 pud:100001067 pmd:100002067
page: refcount:1 mapcount:-1 mapping:0000000000000000 index:0x7f1234567 pfn:0x12345
anon flags: 0xfffffc0020908(uptodate|active|owner_2|swapbacked|node=0|zone=1|lastcpupid=0x1fffff)
raw: 000fffffc0020908 dead000000000100 dead000000000122 ffff888003a1d001
page dumped because: bad page map
addr:00007f1234567000 vm_flags:08100073 anon_vma:ffff888003a1d000 mapping:ffff888003b00000 index:5 (file) \
7f1234567 (anon)
file:memfd:x fault:shmem_fault mmap:shmem_mmap mmap_prepare: 0x0 read_folio:0x0
CPU: 1 UID: 0 PID: 321 Comm: my prog Tainted: G    B              7.3.4 #1 PREEMPT
Hardware name: QEMU Standard PC
Call Trace:
 <TASK>
 dump_stack_lvl+0x5d/0x80
 </TASK>"""
# VM_WARN_ON_ONCE_VMA() of 7.3: the VMA first.
VM_WARN_VMA = """\
vma ffff888004000000 start 00007f0000000000 end 00007f0000010000 mm ffff888005000000
prot 8000000000000025 anon_vma 0000000000000000 vm_ops 0000000000000000
pgoff 7f0000000 file 0000000000000000 private_data 0000000000000000
refcnt 1
flags: 0x8100073(read|write|mayread|maywrite|mayexec|account|softdirty)
------------[ cut here ]------------
WARNING: mm/vma.h:277 at assert_sane_pgoff+0x12/0x40, CPU#0: mremap/400
Modules linked in: zram
CPU: 0 UID: 0 PID: 400 Comm: mremap Not tainted 7.3.4 #1
RIP: 0010:assert_sane_pgoff+0x12/0x40
Call Trace:
 <TASK>
 </TASK>
---[ end trace 0000000000000000 ]---"""
OLD_WARNING = """\
------------[ cut here ]------------
WARNING: CPU: 3 PID: 77 at mm/rmap.c:1200 __page_check_anon_rmap+0x40/0x50
Modules linked in:
CPU: 3 PID: 77 Comm: khugepaged Kdump: loaded Not tainted 6.1.0-50-cloud-amd64 #1  Debian 6.1.176-1
---[ end trace 0000000000000000 ]---"""
RSS = "BUG: Bad rss-counter state mm:00000000c0ffee00 type:MM_ANONPAGES val:5 Comm:a.out Pid:99"
VM_BUG = """\
page: refcount:2 mapcount:1 mapping:00000000aaaaaaaa index:0x3 pfn:0x999
page dumped because: VM_BUG_ON_FOLIO(folio_test_large(folio))
------------[ cut here ]------------
kernel BUG at mm/huge_memory.c:3753!
Oops: invalid opcode: 0000 [#1] SMP
CPU: 0 UID: 0 PID: 55 Comm: kcompactd0 Not tainted 7.3.4 #1"""
ARM64 = "arch/arm64/mm/mmu.c:54: bad pmd 0000000012345003."
# Not about memory, or not a complaint.
OTHERS = """\
WARNING: CPU: 0 PID: 1 at drivers/gpu/drm/x.c:5 drm_thing+0x1/0x2
WARNING: net/core/dev.c:12 at net_thing+0x1/0x2, CPU#0: ip/44
kernel BUG at fs/ext4/inode.c:12!
page: refcount:1 mapcount:1 mapping:0000000000000000 index:0x1 pfn:0x1
BUG: kernel NULL pointer dereference, address: 0000000000000008
systemd[1]: BUG: Bad page map in process x  pte:1"""


def lines(text, caller=1, start=1.0):
    return [LogLine(int(start * 1e9) + i * 1000, caller, line) for i, line in enumerate(text.splitlines())]


def complaints(*texts):
    return list(find_complaints([line for text in texts for line in text]))


def test_bad_page_map():
    [one] = complaints(lines(BAD_PAGE_MAP, caller=321))
    assert one.text[0] == "BUG: Bad page map in process my prog  pte:8000000012345867"
    assert one.text[-2].startswith("addr:00007f1234567000 vm_flags:08100073")
    assert "page dumped because: bad page map" in one.text
    assert (one.tid, one.comm, one.address, one.mm) == (321, "my prog", 0x7F1234567000, None)
    assert one.nanoseconds == 10**9


def test_warning_about_a_vma():
    [one] = complaints(lines(VM_WARN_VMA, caller=400))
    assert one.text[0].startswith("WARNING: mm/vma.h:277 at assert_sane_pgoff")
    assert one.text[1].startswith("vma ffff888004000000 start 00007f0000000000")
    assert (one.tid, one.comm) == (400, "mremap")
    assert (one.address, one.mm) == (0x7F0000000000, 0xFFFF888005000000)


@pytest.mark.parametrize(
    ("text", "first", "tid", "comm"),
    [
        (OLD_WARNING, "WARNING: CPU: 3 PID: 77 at mm/rmap.c:1200", 77, "khugepaged"),
        (RSS, "BUG: Bad rss-counter state mm:", 99, "a.out"),
        (VM_BUG, "kernel BUG at mm/huge_memory.c:3753!", 55, "kcompactd0"),
        (ARM64, "arch/arm64/mm/mmu.c:54: bad pmd", 1, None),
        ("BUG: Bad page state in process init  pfn:00123", "BUG: Bad page state", 1, "init"),
        ("mm/pgtable-generic.c:54: bad pmd 00000000a(8000000012345867)", "mm/pgtable-generic.c", 1, None),
        ("BUG: non-zero pgtables_bytes on freeing mm: 4096", "BUG: non-zero", 1, None),
    ],
)
def test_other_complaints(text, first, tid, comm):
    [one] = complaints(lines(text))
    assert one.text[0].startswith(first)
    assert (one.tid, one.comm) == (tid, comm)


def test_what_is_no_complaint_about_memory():
    assert complaints(lines(OTHERS)) == []


def test_threads_that_print_at_the_same_time():
    mixed = [
        line for pair in zip(lines(VM_WARN_VMA, 400), lines(BAD_PAGE_MAP, 321), strict=False) for line in pair
    ]
    assert [one.tid for one in complaints(mixed)] == [400, 321]
    assert [one.address for one in complaints(mixed)] == [0x7F0000000000, 0x7F1234567000]


def test_complaints_one_after_the_other():
    found = complaints(lines(BAD_PAGE_MAP), lines(RSS, start=1.1), lines(VM_WARN_VMA, start=1.2))
    assert [one.text[0].split(" ")[1] for one in found] == ["Bad", "Bad", "mm/vma.h:277"]
    # The dump of a page long before a warning has nothing to do with it.
    dump = VM_BUG.splitlines()[0]
    [one] = complaints(lines(dump), lines("kernel BUG at mm/slub.c:1!", start=9))
    assert one.text == ["kernel BUG at mm/slub.c:1!"]


def test_interrupts_have_no_thread():
    [one] = complaints(lines(RSS.split(" Comm")[0], caller=1 << 31 | 2))
    assert one.tid is None


PRB, RING, DESCS, INFOS, TEXT = (0xFFFFFFFF82000000 + i * 0x10000 for i in range(5))
RING_MEMBERS = ("count_bits", "descs", "infos", "head_id", "tail_id", "size_bits", "data")


def words(name, size, **sizes):
    members = {key: Member(8 * i, width) for i, (key, width) in enumerate(sizes.items())}
    return StructLayout(name, size, members)


HOW = PrintkLayout(
    PRB,
    words("struct printk_ringbuffer", 56, **dict.fromkeys(RING_MEMBERS, 8)),
    words("struct prb_desc", 24, state_var=8, begin=8, next=8),
    words("struct printk_info", 32, ts_nsec=8, text_len=2, facility=1, caller_id=4),
)
FINAL = 2 << 62


def ring(records, tail=0, head=None, size_bits=8, text=b""):
    """A ring of four descriptors; records are (state, id, begin, end, length, facility)."""
    memory = Memory()
    memory.put_words(PRB, [RING])
    head = tail + len(records) - 1 if head is None else head
    memory.put_words(RING, [2, DESCS, INFOS, head, tail, size_bits, TEXT])
    for state, id_, begin, end, length, facility in records:
        memory.put_words(DESCS + (id_ & 3) * 24, [state | id_, begin, end])
        memory.put_words(INFOS + (id_ & 3) * 32, [id_ * 1000, length, facility, 7])
    for i in range(4):
        if not any(id_ & 3 == i for _, id_, *_ in records):
            memory.put_words(DESCS + i * 24, [0, 0, 0])
            memory.put_words(INFOS + i * 32, [0, 0, 0, 0])
    memory.put(TEXT, text.ljust(1 << size_bits, b"\0"))
    return memory.prog


def block(text):
    return struct.pack("<Q", 0) + text


def test_lines_of_the_ring():
    text = block(b"first\nof two").ljust(24, b"\0") + block(b"user's") + bytes(2) + block(b"lost")
    prog = ring(
        [
            (FINAL, 8, 0, 24, 12, 0),
            (FINAL, 9, 24, 40, 6, 1),
            (3 << 62, 10, 40, 56, 4, 0),
            (FINAL, 11, 1, 1, 0, 0),
        ],
        tail=8,
        text=text,
    )
    found = list(read_lines(prog, HOW))
    # What somebody wrote to /dev/kmsg is not the kernel's own; a line may be gone already, or empty.
    assert [line.text for line in found] == ["first", "of two"]
    assert {(line.nanoseconds, line.tid) for line in found} == {(8000, 7)}


def test_a_line_that_begins_anew_at_the_ring_s_start():
    text = block(b"wrapped").ljust(256, b"x")
    prog = ring([(FINAL, 0, 240, 256 + 16, 7, 0)], text=text)
    assert [line.text for line in read_lines(prog, HOW)] == ["wrapped"]


@pytest.mark.parametrize("damage", [{"head": 1 << 40}, {"size_bits": 60}])
def test_a_damaged_ring_is_refused(damage):
    record = (FINAL, 0, 0, 16, 4, 0)
    bits = damage.pop("size_bits", None)
    prog = ring([record], **damage)
    if bits is not None:
        memory = Memory()
        memory.put_words(PRB, [RING])
        memory.put_words(RING, [2, DESCS, INFOS, 0, 0, bits, TEXT])
        prog = memory.prog
    with pytest.raises(KvirtError, match="damaged"):
        list(read_lines(prog, HOW))
