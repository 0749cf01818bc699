# SPDX-License-Identifier: GPL-2.0-only
"""Guests from the command line say how they end, and leave nothing behind; each has its own."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kvirt.lab.guest import Guest, GuestError
from kvirt.lab.kernels import get_kernel

# A boot without KVM on a busy host.
PATIENCE = 180
# One processor: it cannot die over what another one does, as emulated ones now and then do.
SMALL = ("--memory", "512M", "--cpus", "1")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="Guests need root: run the tests with `make test`, which uses sudo."
)


def kvirt(*arguments):
    return [sys.executable, "-m", "kvirt", *arguments]


def descendants(pid):
    """Find the processes that a kvirt has started, virtiofsd's own children included."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def scratch(monkeypatch):
    """A temporary directory for all kvirts of a test, of a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="kvirt-") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


def wait_until(condition, limit=PATIENCE):
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def small_guest(**options):
    return Guest(get_kernel("7.3"), memory="512M", cpus=1, timeout=PATIENCE, **options)


def test_the_command_line_passes_everything_through(scratch):
    done = subprocess.run(
        kvirt("lab", "run", *SMALL, "--", "sh", "-c", "cat; echo err >&2; kill -9 $$"),
        input="in\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stdout == "in\n"
    assert done.stderr.endswith("err\n")
    assert list(scratch.iterdir()) == []


def test_a_guest_that_takes_too_long_is_ended_and_its_console_shown():
    done = subprocess.run(
        kvirt("lab", "run", *SMALL, "--timeout", "6", "--", "sleep", "1000"),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2
    assert "kvirt: The guest was ended after 6 s, its time limit" in done.stderr
    assert re.search(r"The end of its console:\n\[ +\d+\.", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_boot_that_hangs_is_told_from_one_that_dies(monkeypatch):
    monkeypatch.setattr("kvirt.lab.guest.BOOT_SECONDS", 2)
    with pytest.raises(GuestError, match="hangs: it has not come up within 2 s"), small_guest():
        pytest.fail("it booted")


def test_a_guest_that_panics_says_so():
    with small_guest() as guest:
        process = guest.popen(["sh", "-c", "echo c >/proc/sysrq-trigger"])
        with pytest.raises(GuestError, match=r"panicked: sysrq triggered crash\.(.|\n)*Kernel panic"):
            process.wait(PATIENCE)
        with pytest.raises(GuestError, match="panicked"):
            guest.run(["true"])


def test_a_kernel_that_cannot_find_its_root_dies_and_is_tried_again():
    said = []
    with (
        pytest.raises(GuestError, match="panicked: VFS: Unable to mount root"),
        small_guest(append="root=none", report=said.append),
    ):
        pytest.fail("it booted")
    assert sum("Trying again" in line for line in said) == 2


def test_what_qemu_refuses_is_said_in_its_words():
    with (
        pytest.raises(GuestError, match=r"QEMU could not run the guest: .*memory"),
        Guest(get_kernel("7.3"), memory="999999G"),
    ):
        pytest.fail("it booted")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_kvirt_ends(number, scratch):
    child = subprocess.Popen(
        kvirt("lab", "run", *SMALL, "--", "sh", "-c", "echo up; exec sleep 1000"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with contextlib.closing(child.stdout):
        assert child.stdout.readline() == b"up\n"
        started = descendants(child.pid)
        assert len(started) >= 5
        child.send_signal(number)
        assert child.wait(30) != 0
        wait_until(lambda: not any(map(alive, started)), 10)
    if number == signal.SIGKILL:
        # Nobody could remove its directory; the next guest does.
        (left,) = scratch.iterdir()
        with small_guest():
            assert not left.exists()
    assert list(scratch.iterdir()) == []


def test_a_shell_works_on_a_terminal():
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, kvirt("lab", "shell", *SMALL))
    typed, seen = False, b""
    deadline = time.monotonic() + PATIENCE
    with contextlib.suppress(OSError):  # What reading a terminal gives at the end.
        while time.monotonic() < deadline:
            seen += os.read(terminal, 4096)
            if not typed and seen.rstrip().endswith(b"#"):
                os.write(terminal, b"test -t 0 && echo status-$((6*7)); exit 5\n")
                typed = True
    _, status = os.waitpid(pid, 0)
    assert b"status-42" in seen
    assert os.waitstatus_to_exitcode(status) == 5


def test_a_dump_of_a_guest_with_a_command_in_it(tmp_path):
    core = tmp_path / "vmcore"
    words = ["lab", "dump", "--memory", "1G", "-o", str(core), "--", "sh", "-c", "echo ready; sleep 1000"]
    done = subprocess.run(kvirt(*words), capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    printed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert printed["core"] == str(core)
    listed = subprocess.run(
        kvirt("-c", printed["core"], "-s", printed["vmlinux"], "vmas", "1", "--format", "json"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(listed.stdout)["vmas"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kernel", "newest"], "neither a kernel version"),
        (["--kernel", "/etc/passwd"], "not a bzImage"),
        (["--memory", "lots"], "no size of memory"),
        (["--vmlinux", "/etc/passwd"], "goes with a bzImage"),
    ],
)
def test_wrong_words_are_one_sentence_and_status_2(arguments, sentence):
    done = subprocess.run(
        kvirt("lab", "run", *arguments, "--", "true"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
