# SPDX-License-Identifier: GPL-2.0-only
"""What is not a kernel is refused with a sentence. Real dumps are damaged in tests/vmcore."""

import socket
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import drgn
import pytest

from kvirt import target
from kvirt.errors import KvirtError
from kvirt.target import open_target


def elf_core(machine=62, phnum=0, filesz=0, type_=4):
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", type_, machine, 1, 0, 64, 0, 0, 64, 56, phnum, 0, 0, 0)
    return header + b"".join(
        struct.pack("<IIQQQQQQ", 1, 0, 64 + 56 * phnum, 0, 0, filesz, filesz, 0) for _ in range(phnum)
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello\n" * 100, "not a vmcore"),
        (bytes(5000), "not a vmcore"),
        (elf_core(type_=2), "not a vmcore"),
        (elf_core(phnum=1, filesz=1 << 30), "truncated: it should have 1073741944 bytes and has 120"),
        (elf_core()[:40], "not a vmcore"),
        # A process's core dump is a core, but of no kernel.
        (elf_core(phnum=1), "not a dump of a Linux kernel"),
    ],
)
def test_not_a_vmcore(tmp_path, content, words):
    path = tmp_path / "vmcore"
    path.write_bytes(content)
    with pytest.raises(KvirtError, match=words) as caught:
        open_target(core=path)
    assert str(path) in str(caught.value)


def test_core_that_is_not_there(tmp_path):
    with pytest.raises(KvirtError, match="does not exist"):
        open_target(core=tmp_path / "vmcore")
    with pytest.raises(KvirtError, match="is a directory"):
        open_target(core=tmp_path)


@pytest.mark.skipif(Path("/proc/kcore").exists(), reason="This machine has /proc/kcore.")
def test_machine_without_kcore():
    with pytest.raises(KvirtError, match="no /proc/kcore"):
        open_target()


def test_qemu_that_is_not_there(tmp_path):
    with pytest.raises(KvirtError, match="does not exist"):
        open_target(qemu=tmp_path / "qmp.sock")
    path = tmp_path / "left-over.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    with pytest.raises(KvirtError, match="Nobody listens"):
        open_target(qemu=path)


def test_socket_that_does_not_speak_qmp(tmp_path):
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve():
            connection, _ = server.accept()
            connection.sendall(b"220 welcome\r\n")
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(KvirtError, match="does not speak QMP"):
            open_target(qemu=path)
        thread.join()


def test_debug_information_of_a_server_when_the_kernel_tells_no_types(monkeypatch, tmp_path):
    prog = SimpleNamespace(
        flags=drgn.ProgramFlags.IS_LINUX_KERNEL,
        platform=drgn.host_platform,
        enabled_debug_info_finders=lambda: ["standard", "debuginfod"],
        type=str,
    )
    asked, begun = [], []

    def load(prog, symbols, finders):
        asked.append(finders)
        if "debuginfod" not in finders:
            raise target._NoDebugInfoError("No debug information was found.")

    def refuse(prog):
        raise KvirtError("This kernel does not carry its types.")

    monkeypatch.setattr(target, "_open_core", lambda path: prog)
    monkeypatch.setattr(target, "_load_dwarf", load)
    monkeypatch.setattr(target, "_learn", refuse)
    opened = open_target(core=tmp_path / "vmcore", meanwhile=lambda: begun.append(True))
    assert (opened.types, asked) == ("dwarf", [["standard"], ["standard", "debuginfod"]])
    assert begun == [True]
