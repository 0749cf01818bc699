# SPDX-License-Identifier: GPL-2.0-only
import os
import signal
import threading
import time

import pytest

from kvirt.aside import Aside
from kvirt.errors import FilteredError, KvirtError


def refuse(error):
    raise error


def run(work):
    with Aside(work) as aside:
        return aside.result()


def test_result_is_of_another_process():
    here, there = os.getpid(), run(os.getpid)
    assert there != here


def test_large_results_come_whole():
    assert run(lambda: list(range(300_000))) == list(range(300_000))


def test_errors_come_back():
    for kind in (KvirtError, FilteredError):
        with pytest.raises(KvirtError, match=r"^This kernel has no BTF\.$") as caught:
            run(lambda: refuse(kind("This kernel has no BTF.")))  # noqa: B023
        assert type(caught.value) is kind


def test_what_comes_to_no_end_there_is_done_here():
    here = os.getpid()

    def end_elsewhere():
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    assert run(end_elsewhere) == "done"


def test_defects_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_nothing_is_left_of_one_that_nobody_waits_for():
    began = time.monotonic()
    with Aside(lambda: time.sleep(60)) as aside:
        pass
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(aside._pid, 0)


def test_signals_of_the_terminal_end_it():
    before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(3))
    try:
        with Aside(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(60)) as aside:
            began = time.monotonic()
            os.waitid(os.P_PID, aside._pid, os.WEXITED | os.WNOWAIT)
            assert time.monotonic() - began < 30
            status = os.waitid(os.P_PID, aside._pid, os.WEXITED | os.WNOWAIT)
        assert (status.si_code, status.si_status) == (os.CLD_KILLED, signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_where_no_more_processes_may_be_it_is_done_here(monkeypatch):
    def refuse():
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", refuse)
    assert run(os.getpid) == os.getpid()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}


def test_children_that_nobody_may_wait_for():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert run(lambda: "done") == "done"
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_interrupted_when_it_has_just_begun(monkeypatch, elsewhere):
    fork, children = os.fork, []
    # A thread that does not block signals gets those that this one blocks.
    idle = threading.Event()
    thread = threading.Thread(target=idle.wait)

    def interrupted():
        pid = fork()
        if pid:
            children.append(pid)
            if elsewhere:
                signal.pthread_kill(thread.ident, signal.SIGINT)
                # Whoever gets the interpreter's lock back runs the handlers.
                time.sleep(0.01)
            else:
                signal.raise_signal(signal.SIGINT)
        return pid

    thread.start()
    monkeypatch.setattr(os, "fork", interrupted)
    before = signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        with pytest.raises(KeyboardInterrupt):
            run(lambda: time.sleep(60))
    finally:
        idle.set()
        thread.join()
    assert (signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


def test_interrupted_before_it_begins(monkeypatch):
    sigmask, before = signal.pthread_sigmask, signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def late(how, numbers):
        done = sigmask(how, numbers)
        if how == signal.SIG_BLOCK and numbers:
            # It runs the handlers of what came before it.
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(signal, "pthread_sigmask", late)
        run(os.getpid)
    assert sigmask(signal.SIG_BLOCK, ()) == before


def test_all_that_comes_meanwhile_comes_afterwards(monkeypatch):
    fork, came, idle = os.fork, [], threading.Event()
    thread = threading.Thread(target=idle.wait)

    def signalled():
        pid = fork()
        if pid:
            # To a thread that does not block them.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.pthread_kill(thread.ident, number)
            time.sleep(0.01)
        return pid

    thread.start()
    monkeypatch.setattr(os, "fork", signalled)
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            run(os.getpid)
        assert came == [signal.SIGTERM]
    finally:
        idle.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
