# SPDX-License-Identifier: GPL-2.0-only
"""What stands around the counting in ``kvirt trace``; the counting itself is made up."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jsonschema
import pytest
from click.testing import CliRunner

from kvirt.cli import cli
from kvirt.render.json import schema
from kvirt.trace import environment, session
from kvirt.trace.command import CannotRun, Command
from tests.unit.test_layout_trace import Kernel
from tests.unit.trace.samples import sound, troubled

PATIENCE = 10


@pytest.fixture
def machine(monkeypatch):
    """A machine that can trace, and on which what the fixture is set to is counted."""

    class Machine:
        counts = sound()
        request = None
        entered = left = 0

    class Session:
        single = False

        def __init__(self, request, layout, bcc):
            Machine.request = request

        def __enter__(self):
            Machine.entered += 1
            self.began = time.monotonic()
            return self

        def __exit__(self, *exception):
            Machine.left += 1

        def follow(self, pid):
            Machine.followed = pid

        def poll(self, seconds):
            time.sleep(min(seconds, 0.01))
            return []

        def stop(self):
            pass

        def counts(self):
            return replace(Machine.counts, seconds=time.monotonic() - self.began)

    monkeypatch.setattr("kvirt.btf.kernel_btf", lambda: None)
    monkeypatch.setattr("kvirt.layout_trace.read_trace_layout", lambda btf: Kernel().layout())
    monkeypatch.setattr("kvirt.cli.trace.need_first_pid_namespace", lambda: None)
    monkeypatch.setattr(environment, "check", lambda: None)
    monkeypatch.setattr(environment, "load_bcc", lambda: None)
    monkeypatch.setattr(session, "Session", Session)
    yield Machine
    assert Machine.entered == Machine.left


def run(*arguments):
    return CliRunner().invoke(cli, ["trace", *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rmmap"], "'rmmap' cannot be traced"),
        (["1", "rmap"], "rmap stands behind a number"),
        (["1", "2", "3"], "more numbers"),
        (["0"], "The interval is a number of seconds from 0.1 on, not 0"),
        (["1", "0"], "The count is a whole number from 1 on, not 0"),
        (["1", "1.5"], "The count is a whole number from 1 on, not 1.5"),
        (["-d", "nan"], "-d is a number of seconds from 0.1 on, not nan"),
        (["1", "2", "-d", "3"], "both say when to end"),
        (["rmap", "--stacks"], "copy-vma sees that: add it"),
        (["--ebpf", "1"], "--ebpf prints the program and runs nothing"),
        (["--ebpf", "--", "true"], "--ebpf prints the program and runs nothing"),
        (["--"], "There is no command behind the '--'"),
        (["-p", "1", "--", "true"], "leave out -p, --comm and --cgroup"),
        (["-d", "1", "--", "true"], "leave out -d and the count"),
        (["1", "2", "--", "true"], "leave out -d and the count"),
    ],
)
def test_contradictions(machine, arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr and done.stdout == ""
    assert not machine.entered


def test_words_choose(machine):
    assert run("split-vma", "rmap", "0.1", "1").exit_code == 0
    asked = machine.request
    assert (asked.rmap, asked.copy_vma, asked.split_vma) == (True, False, True)
    assert run("-d", "0.1", "--stacks").exit_code == 0
    asked = machine.request
    assert (asked.rmap, asked.copy_vma, asked.split_vma, asked.stacks) == (True, True, True, True)


def test_what_stands_behind_the_dashes_is_the_command_s(machine):
    done = run("copy-vma", "--", "sh", "-c", "exit $#", "--", "--top", "-p", "--")
    assert done.exit_code == 3, done.stderr
    assert machine.request.family and machine.followed
    assert "sh -c 'exit $#' -- --top -p --" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "counts", "status"),
    [
        (["0.1", "1"], sound(), 0),
        (["0.1", "1"], troubled(), 1),
        (["0.1", "1"], replace(sound(), probes={"copy_vma": "absent: Inlined."}), 3),
        (["0.1", "1"], replace(sound(), lost={"no room": 1}), 3),
        (["--", "sh", "-c", "exit 7"], sound(), 7),
        (["--", "sh", "-c", "kill -9 $$"], sound(), 137),
        (["--", "sh", "-c", "exit 7"], troubled(), 1),
        (["--", "sh", "-c", "exit 7"], replace(sound(), lost={"no room": 1}), 7),
        (["--", "/nowhere/kvirt"], sound(), 127),
        (["--", "/dev/null"], sound(), 126),
    ],
)
def test_exit_status(machine, arguments, counts, status):
    machine.counts = counts
    assert run(*arguments).exit_code == status


def test_one_document_for_each_interval(machine):
    machine.counts = troubled()
    done = run("0.1", "3", "--format", "json", "--stacks")
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(documents) == 3
    for document in documents:
        jsonschema.validate(document, schema("kvirt.trace/1"))
        # All was counted before the first began.
        assert document["copy_vma"]["hit"] == 0 and document["seconds"] < 1
    (total,) = run("-d", "0.1", "--format", "json").stdout.splitlines()
    document = json.loads(total)
    jsonschema.validate(document, schema("kvirt.trace/1"))
    assert document["copy_vma"]["hit"] == 60 and document["split_vma"] is None


def test_ends_with_a_summary_when_it_is_told_to(machine, monkeypatch):
    for number in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setattr(
            "kvirt.cli.trace.Printer.begin", lambda self, counts, n=number: os.kill(os.getpid(), n)
        )
        done = run("60")
        assert done.exit_code == 0
        assert "CONSISTENT: no violation" in done.stdout
    assert machine.left == 2


def wait(command):
    deadline = time.monotonic() + PATIENCE
    while (status := command.status()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return status


def test_command_runs_when_it_is_told_to(tmp_path):
    with Command(["sh", "-c", f"echo $$ >{tmp_path}/pid; kill -TERM $$"]) as command:
        time.sleep(0.1)
        assert not (tmp_path / "pid").exists() and command.status() is None
        command.start()
        assert wait(command) == 128 + signal.SIGTERM
    assert (tmp_path / "pid").read_text() == f"{command.pid}\n"


def test_command_that_cannot_run(tmp_path):
    script = tmp_path / "script"
    script.write_text("")
    for name, status in (("no-such-command", 127), (str(script), 126)):
        with pytest.raises(CannotRun) as refused:
            Command([name])
        assert refused.value.status == status
    # The kernel does not know the format.
    script.write_bytes(b"\x7fELF")
    script.chmod(0o755)
    with Command([str(script)]) as command:
        with pytest.raises(CannotRun, match=os.strerror(errno.ENOEXEC)) as refused:
            command.start()
        assert refused.value.status == 126


def test_command_never_runs_for_a_parent_that_is_gone(tmp_path):
    program = (
        "import os, signal\n"
        "from kvirt.trace.command import Command\n"
        f"command = Command(['touch', '{tmp_path}/ran'])\n"
        "print(command.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # The child has the pipe too: this ends when it is gone.
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == -signal.SIGKILL and int(done.stdout)
    assert not (tmp_path / "ran").exists()


def test_command_is_ended_by_an_exception():
    with pytest.raises(ZeroDivisionError), Command(["sleep", "600"]) as command:
        command.start()
        raise ZeroDivisionError
    assert wait(command) == 128 + signal.SIGTERM
