# SPDX-License-Identifier: GPL-2.0-only
"""Guests that really crash, and what a capture kernel saved of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvirt.lab import capture
from kvirt.lab.guest import Guest, GuestError
from kvirt.lab.kernels import get_kernel

PATIENCE = 300
# Where a kernel starts that has not been moved (arch/x86/Kconfig: PHYSICAL_START), and its direct maps.
LINKED = 0xFFFFFFFF81000000
DIRECT_MAPS = ("0xffff888000000000", "0xff11000000000000")
# KASLR moves the kernel and its direct map; one of the two may stay by chance.
PLACES = """\
print(hex(prog.symbol("_stext").address), hex(prog["page_offset_base"]))
"""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="Guests need root: run the tests with `make test`, which uses sudo."
)


def kvirt(*arguments):
    argv = [sys.executable, "-m", "kvirt", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    """The dumps of one crash by name, the vmlinux, and the PID of the workload."""
    directory = tmp_path_factory.mktemp("crash") / "saved"
    done = kvirt("lab", "crash", "--memory", "1G", "--timeout", PATIENCE, "-o", directory)
    assert done.returncode == 0, done.stderr
    printed = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert printed[:2] == [["core", str(directory / name)] for name in ("vmcore-d31", "vmcore-d1")]
    assert printed[2][0] == "vmlinux"
    assert {path.name for path in directory.iterdir()} == {"vmcore-d31", "vmcore-d1"}
    pid = int(re.search(r'"pid": (\d+)', done.stderr)[1])
    yield {path.name: path for path in directory.iterdir()}, printed[2][1], pid
    for path in directory.iterdir():
        path.unlink()


def test_what_has_no_zeros_is_checked_whole(crashed):
    cores, vmlinux, pid = crashed
    target = ("-c", cores["vmcore-d1"], "-s", vmlinux)
    done = kvirt(*target, "check-all")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout.startswith("CONSISTENT: no errors")
    assert re.search(r"^anonymous pages: all [\d,]{6,} verified$", done.stdout, re.MULTILINE)
    assert kvirt(*target, "check-pid", pid, "--no-vmas").returncode == 0


def test_no_vmlinux_is_needed(crashed):
    cores, _, pid = crashed
    for command in (["check-all"], ["check-pid", pid, "--no-vmas"]):
        done = kvirt("-c", cores["vmcore-d1"], "--types", "btf", *command)
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert done.stdout.startswith("CONSISTENT: no errors")
        assert "types from BTF" in done.stdout


def test_what_was_filtered_is_not_held_to_be_wrong(crashed):
    """What makedumpfile makes of this kernel depends on both: all of it, or the reason why not."""
    cores, vmlinux, pid = crashed
    for command in (["check-all"], ["check-pid", pid, "--no-vmas"], ["check-pid", pid, "--format", "json"]):
        done = kvirt("-c", cores["vmcore-d31"], "-s", vmlinux, *command)
        assert done.returncode in (0, 3), (done.stdout, done.stderr)
        said = " ".join((done.stdout + done.stderr).split())
        why = "This dump was filtered (makedumpfile's dump level 31)" in said and "makedumpfile -d 1" in said
        assert why == (done.returncode == 3)


def test_the_kernel_had_been_moved(crashed, tmp_path):
    cores, vmlinux, _ = crashed
    script = tmp_path / "places.py"
    script.write_text(PLACES)
    drgn = Path(sys.executable).parent / "drgn"
    argv = [drgn, "-q", "-c", cores["vmcore-d1"], "-s", vmlinux, script]
    stext, base = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    assert int(stext, 16) != LINKED or base not in DIRECT_MAPS


def test_what_cannot_be_saved_is_told_with_the_console(tmp_path):
    with (
        pytest.raises(GuestError, match=r"its memory could not be saved\.(.|\n)*makedumpfile"),
        Guest(get_kernel("7.3"), memory="1G", cpus=1, timeout=PATIENCE, output=tmp_path) as guest,
    ):
        capture.crash(guest, ["z99"])
    assert not (tmp_path / "z99").exists()


def test_a_capture_kernel_that_cannot_be_loaded(tmp_path):
    refuse = "echo 1 >/proc/sys/kernel/kexec_load_disabled; echo ready"
    words = ["--memory", "1G", "--cpus", "1", "-o", tmp_path / "vmcore", "-d", "1", "--", "sh", "-c", refuse]
    done = kvirt("lab", "crash", *words)
    assert done.returncode == 2
    assert "failed in the guest" in done.stderr
    assert "kexec" in done.stderr
    assert list(tmp_path.iterdir()) == []
