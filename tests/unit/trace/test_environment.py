# SPDX-License-Identifier: GPL-2.0-only
"""What tracing needs, one thing missing at a time, on a made-up machine. The real ones are in tests/live."""

import re
import sys

import pytest

from kvirt.errors import KvirtError
from kvirt.trace import environment
from kvirt.trace.environment import check, load_bcc, switched_off

RELEASE = "7.3.4-test"
FILES = {
    "proc/self/status": "Name:\tkvirt\nUid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\n",
    "proc/self/ns/user": "",
    "proc/sys/kernel/osrelease": RELEASE + "\n",
    "sys/bus/event_source/devices/kprobe/type": "8\n",
    "sys/fs/bpf/.keep": "",
    "sys/kernel/debug/kprobes/enabled": "1\n",
    "proc/sys/kernel/ftrace_enabled": "1\n",
    "sys/kernel/security/lockdown": "none [integrity] confidentiality\n",
    f"lib/modules/{RELEASE}/source/include/linux/kconfig.h": "",
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)

    def make(**changes):
        """Change files, named by the end of their path; None takes one away."""
        for path, text in FILES.items():
            name = path.rpartition("/")[2].partition(".")[0]
            text = changes.pop(name, text)
            if text is not None:
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).write_text(text)
        assert not changes
        inode = (tmp_path / "proc/self/ns/user").stat().st_ino
        monkeypatch.setattr(environment, "USER_NS_INIT_INO", inode)
        return tmp_path

    return make


def test_all_is_there(machine):
    check(machine())


def test_what_cannot_be_read_says_nothing(machine):
    root = machine(enabled=None, ftrace_enabled=None, lockdown=None)
    check(root)
    assert switched_off(True, root) == []


def test_probes_that_are_not_called(machine):
    kprobes = "Kprobes are turned off, and not everything is counted: turn it on with "
    functions = kprobes.replace("Kprobes are", "Tracing of functions is")
    assert switched_off(True, machine()) == []
    root = machine(enabled="0\n", ftrace_enabled="0\n")
    assert switched_off(False, root) == [f"{functions}'echo 1 > /proc/sys/kernel/ftrace_enabled'."]
    assert switched_off(True, root)[1:] == [f"{kprobes}'echo 1 > /sys/kernel/debug/kprobes/enabled'."]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"status": "Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000\n"},
            "Tracing the kernel needs root: run kvirt again with sudo.",
        ),
        (
            {"status": "Uid:\t0\t0\t0\t0\nCapEff:\t00000000a80425fb\n"},
            "Root may not trace the kernel here, because it lacks CAP_SYS_ADMIN, .*",
        ),
        (
            {"lockdown": "none integrity [confidentiality]\n"},
            "The kernel is locked down, .* boot without lockdown=confidentiality .*",
        ),
    ],
)
def test_sentences(machine, changes, sentence):
    with pytest.raises(KvirtError) as refused:
        check(machine(**changes))
    assert re.fullmatch(sentence, str(refused.value))


def test_user_namespaces(machine, monkeypatch):
    root = machine()
    monkeypatch.setattr(environment, "USER_NS_INIT_INO", 0xEFFFFFFD)
    with pytest.raises(KvirtError, match="in a container or a user namespace: run kvirt outside"):
        check(root)


def test_no_kprobes(machine):
    root = machine(type=None)
    with pytest.raises(KvirtError, match=r"^/sys is not mounted"):
        check(root)
    (root / "sys/bus/event_source/devices").mkdir(parents=True)
    with pytest.raises(KvirtError, match=r"^This kernel has no kprobes, .* CONFIG_KPROBE_EVENTS=y"):
        check(root)


def test_no_bpf(machine):
    root = machine()
    (root / "sys/fs/bpf/.keep").unlink()
    (root / "sys/fs/bpf").rmdir()
    with pytest.raises(KvirtError, match=r"^This kernel runs no BPF programs: .* CONFIG_BPF_SYSCALL=y\.$"):
        check(root)


def test_headers(machine, monkeypatch):
    root = machine(kconfig=None)
    install = f": install the package linux-headers-{RELEASE}."
    with pytest.raises(KvirtError) as refused:
        check(root)
    assert str(refused.value) == (
        f"The kernel's headers, which bcc compiles with, are not in /lib/modules/{RELEASE}/build" + install
    )
    (root / "lib/modules" / RELEASE / "build").mkdir(parents=True)
    with pytest.raises(KvirtError) as refused:
        check(root)
    assert str(refused.value) == (
        f"There are no kernel headers in /lib/modules/{RELEASE}/build, which bcc compiles with" + install
    )
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/somewhere")
    check(root)
    monkeypatch.delenv("BCC_KERNEL_SOURCE")
    (root / "sys/kernel/kheaders.tar.xz").touch()
    check(root)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Where to put a bcc; there is no other."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "bcc", raising=False)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    yield tmp_path
    sys.modules.pop("bcc", None)


def test_no_bcc(modules, monkeypatch):
    with pytest.raises(KvirtError, match=r"^Tracing needs bcc, .*: install python3-bpfcc \(.*\)\.$"):
        load_bcc()
    monkeypatch.setattr(sys, "prefix", "/venv")
    with pytest.raises(KvirtError, match=r", and make this virtual .* with --system-site-packages\.$"):
        load_bcc()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("VERSION = 1", "^The bcc in .*/bcc is not the BPF compiler, .* 'pip uninstall bcc', and install "),
        ("import no_such_module", "^bcc cannot be imported, because no_such_module is missing: install "),
        ("raise OSError('libbcc.so.0: no')", r"^bcc cannot be imported \(libbcc.so.0: no\): install "),
    ],
)
def test_other_bccs(modules, text, sentence):
    (modules / "bcc").mkdir()
    (modules / "bcc" / "__init__.py").write_text(text)
    with pytest.raises(KvirtError, match=sentence):
        load_bcc()


def test_bcc(modules):
    (modules / "bcc.py").write_text("class BPF: pass")
    assert load_bcc().BPF
