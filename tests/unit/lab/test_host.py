# SPDX-License-Identifier: GPL-2.0-only
"""Programs of the host: missing ones are named with their package, started ones do not stay."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvirt.errors import KvirtError
from kvirt.lab import accel, cache, host, virtiofs


def test_a_missing_program_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(host, "SEARCH_PATH", "/nowhere")
    with pytest.raises(KvirtError, match="install the package qemu-system-x86"):
        host.program("qemu-system-x86_64")


def test_a_missing_virtiofsd_is_named_with_both_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(virtiofs, "RUST", tmp_path / "none")
    monkeypatch.setattr(virtiofs, "C", tmp_path / "none")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(KvirtError, match=r"virtiofsd \(Debian 13\) or qemu-system-common"):
        virtiofs.find()


@pytest.mark.parametrize("name", ["plain", "with space", os.fsdecode(b"no \xff text"), "\u0085 \x1c"])
def test_a_socket_is_not_there_until_somebody_listens(tmp_path, name):
    path = tmp_path / name
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as stranger:
        # Of anybody's on the machine, with a name that is more than a line.
        stranger.bind(b"\0of \n a stranger\n")
        assert not virtiofs.listens(path)
        server.bind(str(path))
        assert path.exists()
        assert not virtiofs.listens(path)
        server.listen()
        assert virtiofs.listens(path)
        assert not virtiofs.listens(tmp_path / "with")


def test_both_kinds_of_virtiofsd_are_spoken_to(monkeypatch, tmp_path):
    monkeypatch.setattr(virtiofs, "C", Path("/bin/true"))
    monkeypatch.setattr(virtiofs, "RUST", tmp_path / "none")
    words = virtiofs.arguments(Path("/d"), Path("/s"), "chroot")
    assert words[0] == "/bin/true"
    assert "source=/d,cache=always,sandbox=chroot,log_level=err" in words
    monkeypatch.setattr(virtiofs, "RUST", Path("/bin/true"))
    assert "--shared-dir=/d" in virtiofs.arguments(Path("/d"), Path("/s"), "chroot")


def test_what_is_started_ends_with_the_one_who_started_it():
    script = (
        "import sys; from kvirt.lab import host; print(host.start(['sleep', '60']).pid, flush=True); "
        "sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    time.sleep(0.3)  # Until setpriv has become what it starts.
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid):
    try:
        # A zombie is not alive: whoever inherited it may be slow to reap.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_without_a_kvm_device_guests_are_emulated(monkeypatch, tmp_path):
    monkeypatch.setattr(accel, "DEVICE", tmp_path / "none")
    assert accel.accelerator(tmp_path / "image", pytest.fail) == "tcg"


def test_a_build_that_fails_leaves_nothing(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(ZeroDivisionError), cache.built(target) as directory:
        (directory / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with cache.built(target) as directory:
        (directory / "file").write_text("whole")
    assert (target / "file").read_text() == "whole"


def test_a_cache_that_cannot_be_made_is_a_sentence(monkeypatch):
    monkeypatch.setenv("KVIRT_CACHE", "/proc/none")
    with pytest.raises(KvirtError, match="set KVIRT_CACHE"):
        cache.cache_dir()
