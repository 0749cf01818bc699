# SPDX-License-Identifier: GPL-2.0-only
"""A guest does what is asked of it."""

import signal

import drgn
import pytest

from kvirt.checks.process import ProcessChecker
from kvirt.checks.task import check_task
from kvirt.findings import Severity
from kvirt.lab.guest import GuestError
from kvirt.layout import layout_of
from kvirt.memory import core_of
from kvirt.target import open_target
from kvirt.tasks import find_process

PATIENCE = 180


def test_output_and_status_pass(guest73):
    done = guest73.run(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_death_by_signal_is_128_and_the_signal(guest73):
    assert guest73.run(["sh", "-c", "kill -SEGV $$"]).returncode == 128 + signal.SIGSEGV


def test_input_reaches_the_command(guest73):
    assert guest73.run(["cat"], input="text\n" * 50000).stdout == "text\n" * 50000


def test_a_failure_that_matters_is_an_error_with_its_reason(guest73):
    with pytest.raises(GuestError, match=r"failed in the guest with exit status 3\.\nwhy"):
        guest73.run(["sh", "-c", "echo why >&2; exit 3"], check=True)


def test_a_command_that_takes_too_long_is_ended(guest73):
    with pytest.raises(GuestError, match="`sleep 987` did not end within 1 s"):
        guest73.run(["sleep", "987"], timeout=1)
    # The brackets keep what looks for it from finding itself.
    gone = "while grep -qs '98[7]' /proc/[0-9]*/cmdline; do sleep 0.1; done"
    guest73.run(["sh", "-c", gone], timeout=PATIENCE, check=True)


def test_commands_run_at_the_same_time(guest73):
    waiting = guest73.popen(["cat"])
    assert guest73.run(["test", "-d", f"/proc/{waiting.pid}"]).returncode == 0
    waiting.write(b"line\n")
    assert waiting.readline(30) == "line\n"
    waiting.close_stdin()
    assert waiting.wait(30) == 0


def test_the_guest_is_the_kernel_asked_for_and_has_what_kvirt_needs(guest73):
    script = """
        uname -r
        test -d /sys/firmware/qemu_fw_cfg/by_name/etc/vmcoreinfo || echo no vmcoreinfo
        test -s /usr/lib/debug/boot/vmlinux-$(uname -r) || echo no vmlinux
        test -r /proc/kcore || echo no kcore
        touch /usr/x 2>/dev/null && echo the root can be written
        ls /sys/class/net
        kvirt --version
    """
    lines = guest73.run(["sh", "-c", script], check=True).stdout.splitlines()
    assert lines[0] == guest73.kernel.release
    assert lines[1] == "lo"
    assert lines[2].startswith("kvirt")
    assert len(lines) == 3


def test_addresses_are_randomised(guest73):
    line = guest73.run(["grep", "-w", "_text", "/proc/kallsyms"], check=True).stdout
    assert int(line.split()[0], 16) != 0xFFFFFFFF81000000


def test_a_debugger_on_the_host_reads_the_running_guest(guest73):
    prog = drgn.Program()
    prog.set_qemu_qmp(str(guest73.qmp_socket))
    prog.load_debug_info([guest73.kernel.vmlinux])
    assert prog["init_uts_ns"].name.release.string_().decode() == guest73.kernel.release


def test_a_kdump_compressed_dump(guest73, tmp_path):
    core = guest73.dump(tmp_path / "vmcore", "kdump-zlib")
    assert core.read_bytes()[:12] == b"makedumpfile"
    # It does not name its architecture, and has nothing to be read from directly.
    target = open_target(core=core, symbols=[guest73.kernel.vmlinux])
    assert core_of(target.prog) is None
    checker = ProcessChecker(target.prog, layout_of(target.prog), moves=False)
    report = check_task(checker, find_process(target.prog, guest73.workload["pid"]))
    assert not [finding for finding in report.findings if finding.severity is Severity.ERROR]
    assert report.incomplete == []
    assert report.pages.anon > 1000


def test_a_format_that_this_qemu_lacks_is_a_sentence_and_no_file(guest73, tmp_path):
    with pytest.raises(GuestError, match="could not be written"):
        guest73.dump(tmp_path / "vmcore", "no-such-format")
    with pytest.raises(GuestError, match="a directory that exists"):
        guest73.dump(tmp_path / "none" / "vmcore")
    assert list(tmp_path.iterdir()) == []
    # The monitor is still of use.
    assert guest73.dump(tmp_path / "vmcore").stat().st_size > 0
