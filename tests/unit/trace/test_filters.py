# SPDX-License-Identifier: GPL-2.0-only
"""Whose events are counted: the patterns against fnmatch, processes and cgroups against a made-up /proc."""

import fnmatch
import random

import pytest

from kvirt.errors import KvirtError
from kvirt.trace import filters
from kvirt.trace.filters import Cgroup, Glob, process


@pytest.mark.parametrize(
    ("pattern", "comm", "alike"),
    [
        ("python3", b"python3", True),
        ("python3", b"python3.13", False),
        ("python*", b"python3.13\0junk\0", True),
        ("*", b"", True),
        ("", b"", True),
        ("", b"x", False),
        ("?", b"", False),
        ("kworker/[0-9]*", b"kworker/1:0", True),
        ("[!a-c]x", b"bx", False),
        ("[]x]", b"]", True),
        ("[x", b"[x", True),
        ("[!]", b"[!]", True),
        ("*a*b*", b"xxaxxbxx", True),
        ("*a*b*", b"xxbxxaxx", False),
        ("é*", "écran".encode(), True),
        ("a" * 15, b"a" * 15 + b"\0", True),
        # Nothing behind the first NUL counts: an older, longer name may still be there.
        ("sh", b"sh\0temd-journal\0", True),
    ],
)
def test_patterns(pattern, comm, alike):
    assert Glob.compile(pattern).matches(comm) is alike


def test_patterns_made_up_at_random():
    seen = {True: 0, False: 0}
    chance = random.Random(1)
    for _ in range(3_000):
        pattern = "".join(chance.choices("ab*?[]!-", k=chance.randint(0, 12)))
        comm = "".join(chance.choices("ab]!-[", k=chance.randint(0, 15)))
        alike = fnmatch.fnmatchcase(comm, pattern)
        assert Glob.compile(pattern).matches(comm.encode()) == alike, (pattern, comm)
        seen[alike] += 1
    assert min(seen.values()) > 50


def test_words_hold_the_states():
    glob = Glob.compile("[a-z]?*" + "x" * 13 + "*")
    assert len(glob.masks) == 256
    assert max(glob.masks) < glob.accept == 1 << 15
    assert glob.stars == (1 << 2) | (1 << 15)


@pytest.mark.parametrize(
    ("pattern", "then"), [("a" * 16, "end it with an asterisk"), ("[é]", "put an asterisk in place")]
)
def test_patterns_that_cannot_be(pattern, then):
    with pytest.raises(KvirtError, match=then):
        Glob.compile(pattern)


@pytest.fixture
def proc(tmp_path, monkeypatch):
    root = tmp_path / "proc"
    (root / "self" / "ns").mkdir(parents=True)
    (root / "self" / "ns" / "pid").touch()
    monkeypatch.setattr(filters, "_PROC", root)
    monkeypatch.setattr(filters, "PID_NS_INIT_INO", (root / "self" / "ns" / "pid").stat().st_ino)
    for pid, tgid, more in [(7, 7, "VmSize:\t 10 kB\n"), (8, 7, "VmSize:\t 10 kB\n"), (9, 9, "")]:
        (root / str(pid)).mkdir()
        (root / str(pid) / "status").write_text(f"Name:\tfoo\nTgid:\t{tgid}\n{more}Threads:\t1\n")
    return root


def test_processes(proc, monkeypatch):
    assert process(7) == 7
    for pid, why in [
        (6, "There is no process with PID 6: look for it with ps."),
        (8, "PID 8 (foo) is a thread of the process 7: name that, all of its threads are traced with it."),
        (9, "PID 9 (foo) has no address space, being a kernel thread or having exited: name a user process"),
    ]:
        with pytest.raises(KvirtError) as refused:
            process(pid)
        assert str(refused.value).startswith(why)
    monkeypatch.undo()
    monkeypatch.setattr(filters, "_PROC", proc)
    with pytest.raises(KvirtError, match="a PID namespace"):
        process(7)


@pytest.fixture
def hierarchy(proc, tmp_path, monkeypatch):
    root = tmp_path / "cgroup two"
    for directory in (root, root / "a.slice", root / "a.slice" / "b", tmp_path / "elsewhere"):
        directory.mkdir()
        (directory / "cgroup.procs").touch()
    (root / "none").mkdir()
    escaped = str(root).replace(" ", "\\040")
    (proc / "self" / "mounts").write_text(f"proc /proc proc rw 0 0\ncgroup2 {escaped} cgroup2 rw 0 0\n")
    monkeypatch.setattr(filters, "_ROOT_ID", root.stat().st_ino)
    return root


def test_cgroups(hierarchy):
    inode = (hierarchy / "a.slice" / "b").stat().st_ino
    for path in ("a.slice/b", "/a.slice/b", str(hierarchy / "a.slice" / "b"), "a.slice/b/../b/"):
        assert Cgroup.find(path) == Cgroup(path, inode, 2)
    for path in ("/", str(hierarchy)):
        assert Cgroup.find(path) == Cgroup(path, hierarchy.stat().st_ino, 0)


@pytest.mark.parametrize("path", ["c", "none", "../elsewhere", "a.slice/cgroup.procs"])
def test_cgroups_that_are_not(hierarchy, path):
    with pytest.raises(KvirtError, match=f"There is no cgroup {path} in .*cgroup two: name its directory"):
        Cgroup.find(path)


def test_hierarchies_that_are_not(hierarchy, proc, monkeypatch):
    monkeypatch.setattr(filters, "_ROOT_ID", 1)
    with pytest.raises(KvirtError, match="only a part of the hierarchy"):
        Cgroup.find("a.slice")
    (proc / "self" / "mounts").write_text("cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n")
    with pytest.raises(KvirtError, match="no cgroup2 file system is mounted"):
        Cgroup.find("a.slice")
