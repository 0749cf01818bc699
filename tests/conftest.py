# SPDX-License-Identifier: GPL-2.0-only
"""Guests that tests share, with the workload running in them, and dumps of such guests.

`make test` runs two processes of tests side by side (pytest-xdist): checking dumps keeps one processor busy,
an emulated guest another one. What shares a guest or a dump stays in one process. Guests need memory: each
process has one guest at a time, and that of a dump ends with the dumping.
"""

import contextlib
import json
import os
import signal
import tempfile
from pathlib import Path

import pytest

from kvirt.lab import defaults
from kvirt.lab.guest import Guest
from kvirt.lab.kernels import get_kernel

# The whole session's tests, on a slow machine.
LIFETIME = 3600
# Seconds for the workload to reach all its states, without KVM on a busy machine.
PATIENCE = 300
MODERN, LEGACY = "7.3", "6.12"
# Words for the kernel's command line. Four levels of page tables, as most machines have; emulated processors
# have five.
APPEND = {MODERN: "", LEGACY: "no5lvl"}

# Fixtures by which a test needs the shared guest of the one kernel, and of the other.
OF_GUESTS = ({"guest73", "phases73"}, {"legacy_guest", "phases_legacy"})
# Tests with guests of their own, the longest first: nothing long should be left for the end.
OWN_GUESTS = (
    "tests/live/test_storm.py",
    "tests/live/test_lab.py",
    "tests/live/test_crash.py",
    "tests/live/test_gigantic.py",
)


def pytest_addoption(parser):
    parser.addoption(
        "--write-docs",
        action="store_true",
        help="Write the generated parts of docs/ instead of comparing them.",
    )
    parser.addoption("--suite", default=defaults.SUITE, help="The Debian of the guests that tests share.")


def group(nodeid):
    """Name the tests that run in one process, one after another, for what they share."""
    path = nodeid.partition("::")[0]
    if path.startswith("tests/vmcore/"):
        return "dumps"
    if path.startswith("tests/live/") and path not in OWN_GUESTS:
        # docs/counts.md compares what was counted in both.
        apart = "[legacy_guest" in nodeid and path != "tests/live/test_trace_counts.py"
        return "legacy guest" if apart else "guests"
    return path


def turn(item):
    """Say when a test runs: groups go by how long they take, but the quickest tests are first."""
    name = group(item.nodeid)
    if name == "dumps":
        return 1
    if name == "guests":
        # A fixture may be named by a parameter too.
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        needs = {*item.fixturenames, *(value for value in parameters if isinstance(value, str))}
        first, second = (bool(needs & fixtures) for fixtures in OF_GUESTS)
        # The one kernel's guest ends where the other's begins. What compares both is last.
        return 2 + second + (first and second)
    if name == "legacy guest":
        return 5
    return 6 + OWN_GUESTS.index(name) if name in OWN_GUESTS else 0


def pytest_configure(config):
    """Have Ctrl-C be what it is in a terminal.

    Who runs the tests in the background may have it ignored, and so would all programs that they start.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session):
    """Sort when nobody else sorts any more, and before pytest-xdist takes the order."""
    session.items.sort(key=turn)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Deal out groups; as pytest-xdist's own marks for it do, which pytest 9.2 does not let through."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group(nodeid)

    return Groups(config, log)


@contextlib.contextmanager
def booted(pattern, suite):
    if os.geteuid() != 0:
        pytest.skip("Guests need root: run the tests with `make test`, which uses sudo.")
    with Guest(get_kernel(pattern), timeout=LIFETIME, append=APPEND[pattern], suite=suite) as guest:
        process = guest.popen(["kvirt", "lab", "workload", "--with", "hugetlb,ksm,swap"])
        line = process.readline(PATIENCE)
        if not line:
            pytest.fail(f"The workload failed in the guest: {process.stderr_text()}")
        guest.workload = json.loads(line)
        yield guest


@contextlib.contextmanager
def dumped(pattern, suite):
    with tempfile.TemporaryDirectory(prefix="kvirt-tests-") as directory:
        with booted(pattern, suite) as guest:
            guest.stop()
            core = guest.dump(Path(directory) / "vmcore")
            if pattern == MODERN:
                guest.dump(core.with_name("kdump"), "kdump-zlib")
        yield core, guest.kernel.vmlinux, guest.workload


class SharedGuest:
    """The guest of one kernel at a time."""

    def __init__(self, suite):
        self._suite = suite
        self._running = contextlib.ExitStack()
        self._guests = {}
        self._failures = {}

    def __call__(self, pattern):
        """Give the guest of a kernel, and end that of another."""
        if pattern in self._failures:
            # Another try would take as long.
            raise self._failures[pattern]
        if pattern not in self._guests:
            self.end()
            try:
                self._guests[pattern] = self._running.enter_context(booted(pattern, self._suite))
            except BaseException as error:
                self._failures[pattern] = error
                raise
        return self._guests[pattern]

    def end(self):
        self._guests.clear()
        self._running.close()


@pytest.fixture(scope="session")
def suite(request):
    """The Debian that guests' user space is from."""
    return request.config.getoption("--suite")


@pytest.fixture(scope="session")
def shared_guest(suite):
    shared = SharedGuest(suite)
    yield shared
    shared.end()


@pytest.fixture(scope="module", autouse=True)
def memory_for_own_guests(request, shared_guest):
    if request.node.nodeid in OWN_GUESTS:
        shared_guest.end()


@pytest.fixture(scope="module")
def guest73(shared_guest):
    """A guest that has anonymous page offsets; ``.workload`` is the workload's document."""
    return shared_guest(MODERN)


@pytest.fixture(scope="module")
def legacy_guest(shared_guest):
    """A guest that has none."""
    return shared_guest(LEGACY)


@pytest.fixture(scope="session")
def core73(suite):
    """Path of a dump of a guest like ``guest73``, path of its vmlinux, and the workload's document."""
    with dumped(MODERN, suite) as core:
        yield core


@pytest.fixture(scope="session")
def kdump73(core73):
    """Path of another dump of the same guest at the same moment: kdump-compressed, and flattened."""
    return core73[0].with_name("kdump")


@pytest.fixture(scope="session")
def core_legacy(suite):
    """The same of one like ``legacy_guest``."""
    with dumped(LEGACY, suite) as core:
        yield core
