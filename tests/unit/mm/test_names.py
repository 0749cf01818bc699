# SPDX-License-Identifier: GPL-2.0-only
"""Names of VMAs, sound and damaged, in memory made up by hand."""

from dataclasses import replace

import drgn
import pytest

from kvirt.layout import Member, StructLayout
from kvirt.mm import names
from kvirt.mm.names import Paths, VmaNames, read_string
from kvirt.mm.vma import vma_reader
from tests.unit.fake import SPECIAL_MAPPING_NAME, Memory, make_layout

BASE = 0xFFFF888000000000
HASHED, DNAME = 0xFFFF888000700000, 0xFFFF888000710000
ROOT, USR, LIB, PYTHON = (BASE + 0x1000 * number for number in range(1, 5))
DATA, MAPPED = BASE + 0x6000, BASE + 0x7000
ROOTFS, MOUNTED = BASE + 0x10000, BASE + 0x11000
FILE, VMA, OPS, SPECIAL, WORDS, INODE = (BASE + 0x20000 + 0x1000 * number for number in range(6))
SIMPLE, ANON_INODE, SOCKET, OTHER = (0xFFFFFFFF81000000 + 16 * number for number in range(4))
FUNCTIONS = {SIMPLE: "simple_dname", ANON_INODE: "anon_inodefs_dname", SOCKET: "sockfs_dname"}.get


class Tree:
    """/usr/lib and /usr/python on the root, and /usr/lib/data with another file system on it."""

    def __init__(self):
        self.memory = Memory()
        layout = make_layout()
        vma = StructLayout("struct vm_area_struct", 136, {**layout.vma.members, "anon_name": Member(128, 8)})
        self.layout = replace(layout, vma=vma)
        self.mount(ROOTFS, mnt_root=ROOT, mnt_parent=ROOTFS, mnt_mountpoint=ROOT)
        self.mount(MOUNTED, mnt_root=MAPPED - 0x800, mnt_parent=ROOTFS, mnt_mountpoint=DATA)
        self.dentry(ROOT, b"/", ROOT)
        self.dentry(USR, b"usr", ROOT)
        self.dentry(LIB, b"lib", USR)
        self.dentry(PYTHON, b"python", USR)
        self.dentry(DATA, b"data", LIB)
        self.dentry(MAPPED - 0x800, b"/", MAPPED - 0x800)
        self.dentry(MAPPED, b"mapped", MAPPED - 0x800)
        self.put(self.layout.path.operations, DNAME, d_dname=SIMPLE)
        self.put(self.layout.path.operations, DNAME + 64, d_dname=0)

    def put(self, layout, address, **values):
        self.memory.put_struct(layout, address, values)

    def mount(self, address, **values):
        # The first member of struct vfsmount is mnt_root.
        self.put(self.layout.path.mount, address, **values)

    def dentry(self, address, text, parent, **values):
        self.memory.put(address + 0x100, text + b"and what is behind it")
        values = {"d_parent": parent, "pprev": HASHED, "name": address + 0x100, "len": len(text), **values}
        self.put(self.layout.path.dentry, address, **values)

    def path(self, dentry, mount=ROOTFS):
        mnt = mount + self.layout.path.mount.offset("mnt")
        self.put(self.layout.path.file, FILE, dentry=dentry, mnt=mnt)
        return Paths(self.memory.prog, self.layout.path, FUNCTIONS).d_path(FILE)

    def name(self, layout=None, **values):
        self.put(self.layout.vma, VMA, **values)
        vma = vma_reader(self.memory.prog, self.layout)(VMA)
        return VmaNames(self.memory.prog, layout or self.layout, FUNCTIONS, 0x9000, 0x5000, 0x6000)(vma)


def test_a_path_leads_over_mounts_to_the_root():
    tree = Tree()
    assert tree.path(PYTHON) == b"/usr/python"
    assert tree.path(ROOT) == b"/"
    assert tree.path(MAPPED, MOUNTED) == b"/usr/lib/data/mapped"
    assert tree.path(MAPPED - 0x800, MOUNTED) == b"/usr/lib/data"
    # Not below the root of its mount: as far as its file system goes.
    assert tree.path(MAPPED) == b"/mapped"


def test_what_is_above_several_files_is_read_once():
    tree = Tree()
    mnt = ROOTFS + tree.layout.path.mount.offset("mnt")
    for number, dentry in enumerate((PYTHON, LIB)):
        tree.put(tree.layout.path.file, FILE + 0x100 * number, dentry=dentry, mnt=mnt)
    paths = Paths(tree.memory.prog, tree.layout.path, FUNCTIONS)
    assert paths.d_path(FILE) == b"/usr/python"
    tree.dentry(USR, b"changed", ROOT)
    assert paths.d_path(FILE + 0x100) == b"/usr/lib"


def test_deleted_files_and_those_that_never_had_a_directory():
    tree = Tree()
    tree.dentry(PYTHON, b"python", USR, pprev=0)
    assert tree.path(PYTHON) == b"/usr/python (deleted)"
    tree.dentry(PYTHON, b"memfd:x", PYTHON, pprev=0, d_op=DNAME)
    assert tree.path(PYTHON) == b"/memfd:x (deleted)"
    tree.dentry(PYTHON, b"python", USR, d_op=DNAME + 64)
    assert tree.path(PYTHON) == b"/usr/python"
    # d_path(): the root of such a file system is told by where it is mounted.
    tree.dentry(ROOT, b"/", ROOT, d_op=DNAME)
    assert tree.path(ROOT) == b"/"


def test_names_that_functions_make_up():
    tree = Tree()

    def named(text, function, **values):
        tree.put(tree.layout.path.operations, DNAME, d_dname=function)
        tree.dentry(PYTHON, text, PYTHON, pprev=0, d_op=DNAME, **values)
        return tree.path(PYTHON)

    tree.put(tree.layout.path.inode, INODE, i_ino=4711)
    assert named(b"SYSV00000000", SIMPLE) == b"/SYSV00000000 (deleted)"
    assert named(b"[perf_event]", ANON_INODE) == b"anon_inode:[perf_event]"
    assert named(b"PACKET", SOCKET, d_inode=INODE) == b"socket:[4711]"
    for wild in (0, *WILD):
        with pytest.raises((drgn.FaultError, OverflowError)):
            named(b"PACKET", SOCKET, d_inode=wild)
        assert tree.name(vm_file=FILE) == "?"
    # Nothing is guessed of what others make of it.
    with pytest.raises(ValueError, match="not known"):
        named(b"dmabuf", OTHER)
    assert tree.name(vm_file=FILE) == "?"


def test_names_are_as_long_as_they_are_said_to_be():
    tree = Tree()
    tree.dentry(PYTHON, b"python", USR, len=9)
    assert tree.path(PYTHON) == b"/usr/pythonand"
    tree.dentry(PYTHON, b"py\0hon", USR)
    with pytest.raises(ValueError, match="torn"):
        tree.path(PYTHON)
    tree.dentry(PYTHON, b"python", USR, len=0xFFFFFFFF)
    with pytest.raises(ValueError, match="longer"):
        tree.path(PYTHON)


@pytest.mark.parametrize("leads", ["down", "mounts"])
def test_parents_in_a_circle(leads):
    tree = Tree()
    if leads == "down":
        tree.dentry(USR, b"usr", LIB)
        where = LIB, ROOTFS
    else:
        tree.mount(ROOTFS, mnt_root=ROOT, mnt_parent=MOUNTED, mnt_mountpoint=MAPPED)
        where = MAPPED, MOUNTED
    with pytest.raises(ValueError, match="root"):
        tree.path(*where)
    assert tree.name(vm_file=FILE) == "?"


WILD = [8, 0xDEAD000000000100, (1 << 64) - 8]


@pytest.mark.parametrize("where", WILD)
def test_wild_pointers_make_a_name_unknown(where):
    tree = Tree()
    unknown = [tree.name(**{member: where}) for member in ("vm_file", "vm_ops", "anon_name")]
    assert unknown == ["?"] * 3
    for dentry, mount in ((where, ROOTFS), (PYTHON, where)):
        with pytest.raises((drgn.FaultError, OverflowError)):
            tree.path(dentry, mount)
        assert tree.name(vm_file=FILE) == "?"
    for member in ("name", "d_parent", "d_op"):
        tree.dentry(PYTHON, b"python", USR, **{member: where})
        with pytest.raises((drgn.FaultError, OverflowError)):
            tree.path(PYTHON)
        assert tree.name(vm_file=FILE) == "?"


def test_names_that_are_not_of_files():
    tree = Tree()
    how = tree.layout.special_mapping
    tree.put(how.operations, OPS, name=SPECIAL_MAPPING_NAME)
    tree.put(how.operations, OPS + 64, name=1)
    tree.put(how.mapping, SPECIAL, name=WORDS)
    tree.memory.put(WORDS, b"[vdso]".ljust(64, b"\0") + b"\4\0\0\0a name".ljust(64, b"\0"))
    assert tree.name(vm_start=0x5800, vm_end=0x7000) == "[heap]"
    assert tree.name(vm_start=0x6000, vm_end=0x7000) == ""
    assert tree.name(vm_start=0x8000, vm_end=0x9000) == "[stack]"
    assert tree.name(vm_start=0x10000, vm_end=0x11000, anon_name=WORDS + 64) == "[anon:a name]"
    assert tree.path(PYTHON) == b"/usr/python"
    assert tree.name(vm_file=FILE) == "/usr/python"
    assert tree.name(vm_file=FILE, anon_name=WORDS + 64) == "[anon_shmem:a name]"
    # Operations of any other kind name nothing.
    assert tree.name(vm_ops=OPS + 64, vm_start=0x10000, vm_end=0x11000) == ""
    vma = vma_reader(tree.memory.prog, tree.layout)(VMA)._replace(vm_ops=OPS)
    tree.memory.put(VMA + how.vma.offset("vm_private_data"), SPECIAL.to_bytes(8, "little"))
    assert VmaNames(tree.memory.prog, tree.layout, FUNCTIONS, 0, 0, 0)(vma) == "[vdso]"


def test_a_kernel_whose_types_do_not_tell():
    tree = Tree()
    assert tree.path(PYTHON) == b"/usr/python"
    bare = replace(tree.layout, path=None, special_mapping=None, anon_name=None)
    for values in ({"vm_file": FILE}, {"vm_ops": OPS}, {"anon_name": WORDS}):
        assert tree.name(bare, **values) == "?"
    assert tree.name(bare, vm_start=0x5000, vm_end=0x6000) == "[heap]"


def test_strings_have_an_end(monkeypatch):
    memory = Memory()
    memory.put(WORDS, b"a" * 100 + b"\0" + b"b" * 4095)
    assert read_string(memory.prog, WORDS) == b"a" * 100
    assert read_string(memory.prog, WORDS + 100) == b""
    monkeypatch.setattr(names, "_NAME_MAX", 128)
    with pytest.raises(ValueError, match="end"):
        read_string(memory.prog, WORDS + 128)
