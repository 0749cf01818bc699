# SPDX-License-Identifier: GPL-2.0-only
"""The agent and the host's end of its port, here with a socket for the port and no guest."""

import os
import signal
import socket
import threading

import pytest

from kvirt.lab.agent import Agent
from kvirt.lab.channel import Channel


class Gone(Exception):
    pass


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    agent = Agent(theirs.fileno())
    thread = threading.Thread(target=agent.serve, daemon=True)
    thread.start()
    agent.send(event="hello", release="7.3", vmcoreinfo=True)
    before = set(threading.enumerate())
    yield Channel(ours, lambda: Gone("the guest is gone")), theirs
    ours.shutdown(socket.SHUT_RDWR)
    for started in (set(threading.enumerate()) - before) | {thread}:
        started.join(10)
    theirs.close()


@pytest.fixture
def channel(ends):
    return ends[0]


def test_hello(channel):
    assert channel.wait_hello(5)
    assert channel.hello["release"] == "7.3"


def test_output_is_separate_and_the_status_passes(channel):
    process = channel.start(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert process.wait(10) == 7
    assert process.stdout_text() == "out\n"
    assert process.stderr_text() == "err\n"
    assert process.pid > 0


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGTERM])
def test_death_by_signal(channel, number):
    process = channel.start(["sh", "-c", f"kill -{int(number)} $$"])
    assert process.wait(10) == 128 + number


def test_bytes_of_every_value_arrive(channel):
    got = bytearray()
    process = channel.start(["cat"], stdout=got.extend)
    data = bytes(range(256)) * 1000
    process.write(data)
    process.close_stdin()
    assert process.wait(10) == 0
    assert got == data


def test_who_waits_is_told_when_nobody_takes_the_output(channel):
    def broken(data):
        raise BrokenPipeError

    process = channel.start(["sh", "-c", "while echo again; do :; done"], stdout=broken)
    with pytest.raises(BrokenPipeError):
        process.wait(10)
    process.signal(signal.SIGKILL)
    assert channel.start(["true"]).wait(10) == 0


def test_a_missing_program_is_what_a_shell_says(channel):
    process = channel.start(["/no/such/program"])
    assert process.wait(10) == 127
    assert process.stderr_text() == "/no/such/program: No such file or directory\n"
    refused = channel.start(["/etc/passwd"])
    assert refused.wait(10) == 126


def test_lines_come_one_by_one(channel):
    process = channel.start(["sh", "-c", "echo one; read line; echo $line; printf three"])
    assert process.readline(10) == "one\n"
    with pytest.raises(TimeoutError):
        process.readline(0.1)
    process.write(b"two\n")
    assert process.readline(10) == "two\n"
    assert process.readline(10) == "three"
    assert process.readline(10) == ""
    assert process.stdout_text() == "one\ntwo\nthree"


def test_commands_run_at_the_same_time(channel):
    waiting = channel.start(["cat"])
    quick = channel.start(["echo", "quick"])
    assert quick.wait(10) == 0
    with pytest.raises(TimeoutError):
        waiting.wait(0.1)
    waiting.signal(signal.SIGKILL)
    assert waiting.wait(10) == 137


def test_a_child_left_behind_does_not_hold_the_command_up(channel):
    process = channel.start(["sh", "-c", "echo done; sleep 30 & echo $! >&2"])
    assert process.wait(10) == 0
    assert process.stdout_text() == "done\n"
    channel.start(["kill", process.stderr_text().strip()]).wait(10)


def test_a_terminal(channel):
    process = channel.start(["sh", "-c", "test -t 0 && test -t 1 && stty size"], tty=True)
    assert process.wait(10) == 0, process.stdout_text()


def test_input_to_a_command_that_has_ended_is_dropped(channel):
    process = channel.start(["true"])
    process.wait(10)
    process.write(b"too late")
    process.close_stdin()


def test_whoever_waits_learns_that_the_guest_is_gone(ends):
    channel, port = ends
    process = channel.start(["sleep", "60"])
    pid = process.pid
    threading.Timer(0.2, port.shutdown, [socket.SHUT_RDWR]).start()
    with pytest.raises(Gone):
        process.wait(10)
    with pytest.raises(Gone):
        process.readline(10)
    os.kill(pid, signal.SIGKILL)
