# SPDX-License-Identifier: GPL-2.0-only
"""`kvirt trace` in a running guest: what it says where it cannot run, whose events it counts, and that it
leaves nothing attached, however it ends.
"""

import json
import re
import signal
import time
from functools import partial

import jsonschema
import pytest

from kvirt.lab.guest import Guest
from kvirt.lab.kernels import get_kernel
from kvirt.render.json import schema
from tests.live.test_trace_counts import (
    NUMBER,
    REMAPS,
    added,
    check_copy_vma,
    check_rmap,
    check_split_vma_of_program,
    quiet,
)

# A guest without KVM on a busy host.
PATIENCE = 120
# Seconds for the probes of a killed tracer to be gone.
GONE = 1
MOVES = 3
# Of a screen: the interval, which is longer than asked for on a busy machine.
LAST = re.compile(r"last \d+\.\d s:")
MOVER = "/kvirt/tests/live/mover.py"
KPROBES = "/sys/kernel/debug/kprobes"
# Programs come last: bpftool itself takes a second to start in an emulated guest.
LOOK = f"""
sort {KPROBES}/list
cut -d ' ' -f 1 /sys/kernel/tracing/enabled_functions | sort
bpftool -j prog show | tr , '\\n' | grep '"id"' | sort
"""


def attached(guest):
    """Probes and programs that the kernel has."""
    return guest.run(["sh", "-c", LOOK], timeout=PATIENCE, check=True).stdout


@pytest.fixture(autouse=True)
def nothing_left(request):
    """Whatever a test does, the kernel has the same programs and probes behind it."""
    names = {"guest73", "legacy_guest"} & set(request.fixturenames)
    guests = [request.getfixturevalue(name) for name in names]
    before = [attached(guest) for guest in guests]
    assert not any("copy_vma" in looked for looked in before)
    yield
    assert [attached(guest) for guest in guests] == before


UNSHARED = ["unshare", "-m", "sh", "-ec"]
NOT_ROOT = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "kvirt", "trace"]
UNRELATED = """
mkdir -p /tmp/unrelated/bcc
echo 'version = "0.1"' >/tmp/unrelated/bcc/__init__.py
PYTHONPATH=/tmp/unrelated:$PYTHONPATH exec kvirt trace
"""
# A virtual environment has nothing of the distribution's.
NO_BCC = """
mkdir -p /tmp/venv/bin
ln -sf /usr/bin/python3 /tmp/venv/bin/python3
printf 'home = /usr/bin\\ninclude-system-site-packages = false\\n' >/tmp/venv/pyvenv.cfg
click=$(python3 -c 'import click, pathlib; print(pathlib.Path(click.__file__).parents[1])')
PYTHONPATH=$PYTHONPATH:$click exec /tmp/venv/bin/python3 -m kvirt trace
"""
NO_HEADERS = """
for name in build source; do mount -t tmpfs none /lib/modules/$(uname -r)/$name; done
exec kvirt trace
"""
NO_BTF = """
: >/tmp/empty
mount --bind /tmp/empty /sys/kernel/btf/vmlinux
exec kvirt trace
"""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param(NOT_ROOT, "needs root: run kvirt again with sudo", id="not-root"),
        pytest.param(["sh", "-ec", UNRELATED], "an unrelated package", id="unrelated-bcc"),
        pytest.param(["sh", "-ec", NO_BCC], "needs bcc, which is not installed", id="no-bcc"),
        pytest.param([*UNSHARED, NO_HEADERS], "There are no kernel headers in", id="no-headers"),
        pytest.param([*UNSHARED, NO_BTF], "BTF", id="no-btf"),
        pytest.param(["kvirt", "trace", "-p", "4194304"], "no process with PID 4194304", id="no-pid"),
        pytest.param(["kvirt", "trace", "--cgroup", "no/such"], "no cgroup no/such in", id="no-cgroup"),
    ],
)
def test_one_sentence(guest73, argv, words):
    done = guest73.run(argv, timeout=PATIENCE)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert re.fullmatch(r"kvirt: [^\n]+\.\n", done.stderr), done.stderr
    assert words in done.stderr


@pytest.fixture
def start_in():
    """Start a command in a guest, which is killed at the end of the test if it still runs; wait for its first
    line.
    """
    processes = []

    def one(guest, *argv):
        processes.append(guest.popen(argv))
        assert processes[-1].readline(PATIENCE), processes[-1].stderr_text()
        return processes[-1]

    yield one
    for process in processes:
        process.signal()


@pytest.fixture
def start(guest73, start_in):
    """The same, in one guest."""
    return partial(start_in, guest73)


def move(*movers):
    for mover in movers:
        mover.write(b"\n")
        assert mover.wait(PATIENCE) == 0, mover.stderr_text()


def test_filter_by_name_until_ctrl_c(guest73, start):
    wanted = start("python3", MOVER, "trace-wanted", str(MOVES))
    other = start("python3", MOVER, "traced-not", str(MOVES + 1))
    # The header of the first interval: all is attached.
    tracer = start("kvirt", "trace", "copy-vma", "--comm", "trace-?[a-z]*d", "0.5")
    assert "copy_vma" in attached(guest73)
    move(wanted, other)
    tracer.signal(signal.SIGINT)
    assert tracer.wait(PATIENCE) == 0
    assert tracer.stderr_text() == ""
    lines, summary = tracer.stdout_text().split("\n\n", 1)
    columns = lines.splitlines()[1].split()
    rows = [row.split() for row in lines.splitlines()[2:] if "time" not in row and "-" not in row]
    for name in ("hit", "fallb"):
        assert sum(int(row[columns.index(name)]) for row in rows) == MOVES
    assert f"copy_vma 50.0% hits in {2 * MOVES} calls" in " ".join(summary.split())
    assert f"{MOVES} faulted_displaced_exclusive" in summary
    (ranked,) = [line.split() for line in summary.splitlines() if "trace-wanted" in line]
    assert ranked == [str(wanted.pid), "trace-wanted", str(MOVES), str(MOVES)]
    assert "traced-not" not in summary


def test_filter_by_cgroup_until_sigterm(guest73, start):
    """What is done in it is known in advance, reason by reason; outside of it the same goes on."""
    chosen = ["copy-homecoming", "copy-forked-child", "split-shared", "split-failed", "rmap-displaced-chain"]
    chosen += ["rmap-file-private", "rmap-displaced-devzero", "rmap-mixed", "rmap-alias"]
    group = "/sys/fs/cgroup/kvirt-traced"
    join = f'mkdir -p {group}/below; echo $$ >{group}/below/cgroup.procs; exec "$@"'
    with quiet(guest73):
        # The line that says that the first phase is ready.
        inside = start("sh", "-ec", join, "sh", *REMAPS, NUMBER, *chosen)
        outside = start(*REMAPS, str(int(NUMBER) + 1), *chosen)
        tracer = start("kvirt", "trace", "--cgroup", "kvirt-traced", "--format", "json", "0.5")
        # They wait for lines between their phases, and no longer.
        for process in (inside, outside):
            process.close_stdin()
        assert [process.wait(PATIENCE) for process in (inside, outside)] == [0, 0]
        tracer.signal(signal.SIGTERM)
        assert tracer.wait(PATIENCE) == 0, tracer.stderr_text()
    assert tracer.stderr_text() == ""
    done = [line for line in map(json.loads, inside.stdout_text().splitlines()) if "counts" in line]
    assert [line["phase"] for line in done] == chosen
    first, *others = done
    # What the first prepares with was over.
    forecast = added([first["counts"], *(line[part] for line in others for part in ("setup", "counts"))])
    documents = [json.loads(line) for line in tracer.stdout_text().splitlines()]
    for document in documents:
        jsonschema.validate(document, schema("kvirt.trace/1"))
        assert document["lost"] == {}
    counted = added([{what: one[what] for what in ("rmap", "copy_vma", "split_vma")} for one in documents])
    check_rmap(counted["rmap"], forecast["rmap"])
    check_copy_vma(counted["copy_vma"], forecast["copy_vma"])
    check_split_vma_of_program(counted["split_vma"], forecast["split_vma"])
    guest73.run(["rmdir", f"{group}/below", group], check=True)


def test_a_command_and_its_children(guest73):
    script = f"(echo | python3 {MOVER} child {MOVES} >/dev/null) & wait; exit 7"
    argv = ["kvirt", "trace", "copy-vma", "--format", "json", "--", "sh", "-c", script]
    done = guest73.run(argv, timeout=PATIENCE)
    assert done.returncode == 7, done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout)
    jsonschema.validate(document, schema("kvirt.trace/1"))
    assert document["rmap"] is None and document["split_vma"] is None
    assert document["copy_vma"]["reasons"]["faulted_displaced_exclusive"] == MOVES
    assert document["copy_vma"]["reasons"]["faulted_homecoming"] == MOVES
    (child,) = [process for process in document["processes"] if process["comm"] == "child"]
    assert child["copy_vma"]["fallback"] == MOVES


def test_screen(guest73):
    rows, columns = 20, 80
    tracer = guest73.popen(["kvirt", "trace", "0.5"], tty=True)
    tracer.resize(rows, columns)
    deadline = time.monotonic() + PATIENCE
    clear = "\x1b[2J"
    while tracer.stdout_text().count(clear) < 4:
        assert time.monotonic() < deadline, tracer.stdout_text()
        time.sleep(0.1)
    assert "copy_vma" in attached(guest73)
    tracer.write(b"\x03")
    assert tracer.wait(PATIENCE) == 0
    before, *screens, end = tracer.stdout_text().replace("\r\n", "\n").split(clear)
    assert "compiling" in before
    for screen in screens:
        # The terminal's echo of Ctrl-C stands behind the last.
        lines = screen.removesuffix("^C").removeprefix("\x1b[1;1H").splitlines()
        assert len(lines) < rows
        assert max(map(len, lines)) <= columns
        assert any(map(LAST.match, lines)), screen
    assert (
        "rmap walks:" in end and "assertions: COPY-AP" in end and not any(map(LAST.match, end.splitlines()))
    )


def killed(guest, start_in, *words):
    before = attached(guest)
    tracer = start_in(guest, "kvirt", "trace", *words, "0.5")
    assert "copy_vma" in attached(guest)
    look = f"kill -9 {tracer.pid}; sleep {GONE}; {LOOK}"
    assert guest.run(["sh", "-c", look], timeout=PATIENCE, check=True).stdout == before
    assert tracer.wait(PATIENCE) == 128 + signal.SIGKILL


def test_killed(guest73, start_in):
    killed(guest73, start_in, "--stacks")


def test_killed_on_a_legacy_kernel(legacy_guest, start_in):
    killed(legacy_guest, start_in)


def test_kprobes_that_are_turned_off(legacy_guest):
    """One function alone has a kprobe for its return there."""
    switch = f"echo 0 >{KPROBES}/enabled; trap 'echo 1 >{KPROBES}/enabled' EXIT; kvirt trace copy-vma"
    done = legacy_guest.run(["sh", "-c", switch], timeout=PATIENCE)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert re.fullmatch(r"kvirt: Kprobes are turned off, [^\n]+\.\n", done.stderr), done.stderr


def test_lockdown(suite):
    """It cannot be taken back: in a guest of its own."""
    lock = """
        mount -t securityfs none /sys/kernel/security
        echo confidentiality >/sys/kernel/security/lockdown
        kvirt trace
    """
    with Guest(get_kernel("7.3"), timeout=PATIENCE, suite=suite) as guest:
        done = guest.run(["sh", "-ec", lock], timeout=PATIENCE)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert re.fullmatch(r"kvirt: The kernel is locked down[^\n]+\.\n", done.stderr), done.stderr
