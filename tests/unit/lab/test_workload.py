# SPDX-License-Identifier: GPL-2.0-only
"""The rules of the workload's model, each as kernel-independent arithmetic, and its text formats."""

import json

import pytest

from kvirt.lab import procfs
from kvirt.lab.procfs import PAGE_SHIFT, PAGE_SIZE
from kvirt.lab.workload import program, states
from kvirt.lab.workload.process import NotReached, Skip
from kvirt.lab.workload.regions import Region, compress, expand, join

START = 0x7F0000000000
AWAY = 0x7F1111111000
PG = START >> PAGE_SHIFT
PG_AWAY = AWAY >> PAGE_SHIFT


def region(kind="file-private", pages=8, pgoff=5, written=(), start=START):
    result = Region.mapped(kind, start, pages * PAGE_SIZE, pgoff)
    result.written = {result.address(page) for page in written}
    result.faulted = bool(written)
    return result


def offsets(*regions):
    return [(r.vm_pgoff, r.anon_pgoff) for r in regions]


def test_a_new_mapping_is_in_place():
    assert offsets(region(), region("anon")) == [(5, PG), (PG, PG)]


def test_split_adds_the_distance_to_both_offsets():
    low, middle, high = region(written=[0, 3, 7]).split(3, 6)
    assert offsets(low, middle, high) == [(5, PG), (8, PG + 3), (11, PG + 6)]
    assert [r.pages for r in (low, middle, high)] == [3, 3, 2]
    assert [len(r.written) for r in (low, middle, high)] == [1, 1, 1]


def test_split_at_an_end_gives_no_empty_piece():
    assert len(region().split(0, 3)) == 2
    assert len(region().split(3, 8)) == 2


def test_faulted_memory_takes_its_offsets_along():
    moved = region(written=[2]).moved(AWAY)
    assert offsets(moved) == [(5, PG)]
    assert moved.written == {AWAY + 2 * PAGE_SIZE}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("file-private", (5, PG_AWAY)),
        ("shmem", (5, PG_AWAY)),
        ("devzero", (PG_AWAY, PG_AWAY)),
        ("anon", (PG_AWAY, PG_AWAY)),
    ],
)
def test_unfaulted_memory_is_in_place_wherever_it_goes(kind, expected):
    assert offsets(region(kind).moved(AWAY)) == [expected]


def test_home_again_is_in_place():
    assert offsets(region(written=[0]).moved(AWAY).moved(START)) == [(5, PG)]


def test_what_dontunmap_leaves_is_in_place():
    displaced = region("anon", written=[0]).moved(AWAY)
    left = displaced.left_behind()
    assert offsets(left) == [(PG_AWAY, PG_AWAY)]
    assert not left.faulted
    assert not left.written
    # Linux 6.12 keeps the vm_pgoff, 7.2 does not.
    assert left.legacy_vm_pgoff is None
    displaced = region("devzero", written=[0]).moved(AWAY)
    assert offsets(displaced.left_behind()) == [(5, PG_AWAY)]


def test_dontunmap_in_place_is_the_same_on_every_kernel():
    left = region("anon", written=[0]).left_behind()
    assert left.legacy_vm_pgoff == left.vm_pgoff == PG


def test_fork_copies_offsets_and_inherits_pages():
    child = region(written=[1]).moved(AWAY).forked()
    assert offsets(child) == [(5, PG)]
    assert child.inherited == {AWAY + PAGE_SIZE}
    assert not child.written
    assert child.faulted


def test_wipe_on_fork_empties_but_keeps_the_offsets():
    parent = region("anon", written=[1]).moved(AWAY)
    parent.wipe_on_fork = True
    child = parent.forked()
    assert offsets(child) == [(PG, PG)]
    assert not child.faulted
    assert not child.inherited


def test_join_undoes_split():
    whole = region(written=[1, 6]).moved(AWAY)
    again = join(*whole.split(2, 5))
    assert offsets(again) == offsets(whole)
    assert (again.start, again.end, again.written) == (whole.start, whole.end, whole.written)


def test_join_of_faulted_and_unfaulted_is_faulted():
    low, high = region().split(4)
    high.faulted = True
    assert join(low, high).faulted


def test_join_refuses_what_only_legacy_kernels_merge():
    low = region(pages=5, pgoff=0)
    high = region(pages=5, pgoff=5, start=AWAY, written=[0]).moved(low.end)
    with pytest.raises(ValueError, match="anon page offsets"):
        join(low, high)


def test_join_refuses_a_gap():
    low, _, high = region().split(2, 5)
    with pytest.raises(ValueError, match="not adjacent"):
        join(low, high)


@pytest.mark.parametrize("pages", [[], [3], [3, 4], [0, 1, 2, 3], [0, 2, 4, 9, 10, 11, 12, 40]])
def test_addresses_survive_compression(pages):
    addresses = [START + page * PAGE_SIZE for page in pages]
    assert expand(json.loads(json.dumps(compress(addresses)))) == addresses


def test_long_runs_become_triples():
    assert compress(range(0x1000, 0x9000, 0x2000)) == [["0x1000", "0x9000", "0x2000"]]


def test_a_legacy_offset_is_given_only_where_it_differs():
    natural = region("anon", written=[0]).left_behind().as_json("a", 1)
    assert "legacy_vm_pgoff" not in natural
    displaced = region("anon", written=[0]).moved(AWAY).left_behind().as_json("a", 1)
    assert displaced["legacy_vm_pgoff"] is None


MAPS = """\
55d0c8a00000-55d0c8a02000 r--p 00001000 fe:01 1234   /usr/bin/a name with blanks (deleted)
7f0000000000-7f0000008000 rw-p 00000000 00:00 0
7ffc0a000000-7ffc0a021000 rw-p 00000000 00:00 0      [stack]
"""


def test_maps_are_parsed():
    file, anon, stack = procfs.parse_maps(MAPS)
    assert file == (
        0x55D0C8A00000,
        0x55D0C8A02000,
        "r--p",
        0x1000,
        "fe:01",
        1234,
        "/usr/bin/a name with blanks (deleted)",
    )
    assert anon.path == ""
    assert stack.path == "[stack]"
    assert procfs.find_mapping([file, anon, stack], START + 1) == anon
    assert procfs.find_mapping([file, anon, stack], 0) is None


def test_fields_of_smaps_are_of_the_right_mapping():
    text = "1000-2000 rw-p 0 00:00 0\nAnonHugePages:  2048 kB\n3000-4000 rw-p 0 00:00 0\nRss: 4 kB\n"
    assert procfs.parse_smaps_field(text, 0x1000, "AnonHugePages") == 2048
    assert procfs.parse_smaps_field(text, 0x3000, "AnonHugePages") is None
    assert procfs.parse_smaps_field(text, 0x3000, "Rss") == 4


@pytest.mark.parametrize(
    ("strings", "expected"),
    [
        (b"\0vm_start\0__vm_anon_pgoff_lo\0vm_ops\0", "anon"),
        (b"\0vm_start\0__vm_virt_pgoff_lo\0vm_ops\0", "anon"),
        (b"\0vm_start\0vma_start_anon_pgoff\0vm_pgoff\0", "legacy"),
    ],
)
def test_the_scheme_is_found_by_the_members_name(tmp_path, strings, expected):
    path = tmp_path / "btf"
    path.write_bytes(strings)
    assert program.kernel_scheme(path) == expected


def test_without_btf_the_scheme_is_unknown(tmp_path):
    assert program.kernel_scheme(tmp_path / "none") is None


class FakeProcess:
    def __init__(self):
        self.regions = {}
        self.skipped = []


def test_a_state_that_cannot_be_is_skipped_with_its_reason():
    def make(p):
        raise Skip("There is none.")

    p = FakeProcess()
    states.build(p, {"some": (make, "A note.")})
    assert p.skipped == [("some", "There is none.")]


def test_a_state_that_fails_is_named():
    def make(p):
        raise OSError(12, "Out of memory")

    with pytest.raises(NotReached, match="state some could not be built"):
        states.build(FakeProcess(), {"some": (make, "A note.")})


def test_every_state_says_what_it_is():
    for table in (states.STATES, states.OPTIONAL):
        for name, (_, note) in table.items():
            assert note.endswith("."), name


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit) as exit_info:
        program.main(["--with", "nothing"])
    assert exit_info.value.code == 2
    assert "none of hugetlb, ksm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("always [madvise] never\n", "madvise"),
        ("lzo [lzo-rle] zstd\n", "lzo-rle"),
        ("1024\n", "1024"),
        ("4096\t87380\t6291456\n", "4096\t87380\t6291456"),
        ("[]\n", "[]"),
    ],
)
def test_the_setting_in_force(text, value):
    assert procfs.setting_in_force(text) == value
