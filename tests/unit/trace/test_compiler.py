# SPDX-License-Identifier: GPL-2.0-only
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvirt.trace.compiler import compile_programs

KALLSYMS = Path("/proc/kallsyms")


def compiler(work):
    return SimpleNamespace(BPF=lambda text, cflags: work(text, cflags))


def test_what_is_compiled():
    bcc = compiler(lambda text, cflags: (text, cflags, threading.current_thread()))
    text, cflags, thread = compile_programs(bcc, "int f;", ("-g0",))
    assert (text, cflags) == ("int f;", ["-g0"])
    assert not thread.is_alive()


@pytest.mark.skipif(os.geteuid() != 0, reason="Only root may have mounts of its own.")
@pytest.mark.skipif(not KALLSYMS.exists(), reason="This kernel was built without CONFIG_KALLSYMS.")
def test_the_compiler_sees_no_symbols_and_everybody_else_does():
    mounts = Path("/proc/self/mounts").read_text()
    assert compile_programs(compiler(lambda text, cflags: KALLSYMS.read_text()), "", ()) == ""
    with KALLSYMS.open() as file:
        assert file.readline()
    assert Path("/proc/self/mounts").read_text() == mounts


def test_what_the_compiler_raises():
    def fail(text, cflags):
        raise OSError("Failed to compile")

    with pytest.raises(OSError, match="Failed to compile"):
        compile_programs(compiler(fail), "", ())


def test_a_signal_waits_for_the_compiler():
    ended = []

    def work(text, cflags):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        # Longer than a signal takes.
        threading.Event().wait(0.2)
        ended.append(text)

    with pytest.raises(KeyboardInterrupt):
        compile_programs(compiler(work), "int f;", ())
    assert ended == ["int f;"]
