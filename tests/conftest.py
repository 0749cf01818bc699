# SPDX-License-Identifier: GPL-2.0-only
"""Guests that all tests share: one boot for each kernel, with the workload running in it."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import pytest

from kvirt.lab.guest import Guest
from kvirt.lab.kernels import get_kernel

# The whole session's tests, on a slow machine.
LIFETIME = 3600
# Seconds for the workload to reach all its states, without KVM on a busy machine.
PATIENCE = 300
MODERN, LEGACY = "7.3", "6.12"


def pytest_addoption(parser):
    parser.addoption(
        "--write-docs",
        action="store_true",
        help="Write the generated parts of docs/ instead of comparing them.",
    )


@contextlib.contextmanager
def booted(pattern, append=""):
    if os.geteuid() != 0:
        pytest.skip("Guests need root: run the tests with `make test`, which uses sudo.")
    with Guest(get_kernel(pattern), timeout=LIFETIME, append=append) as guest:
        process = guest.popen(["kvirt", "lab", "workload", "--with", "hugetlb,ksm,swap"])
        line = process.readline(PATIENCE)
        if not line:
            pytest.fail(f"The workload failed in the guest: {process.stderr_text()}")
        guest.workload = json.loads(line)
        yield guest


@contextlib.contextmanager
def dumped(guest):
    with tempfile.TemporaryDirectory(prefix="kvirt-tests-") as directory:
        core = guest.dump(Path(directory) / "vmcore")
        yield core, guest.kernel.vmlinux, guest.workload


@pytest.fixture(scope="session")
def guest73():
    """A guest that has anonymous page offsets; ``.workload`` is the workload's document."""
    with booted(MODERN) as guest:
        yield guest


@pytest.fixture(scope="session")
def legacy_guest():
    """A guest that has none."""
    # And four levels of page tables, as most machines have; emulated processors have five.
    with booted(LEGACY, append="no5lvl") as guest:
        yield guest


@pytest.fixture(scope="session")
def core73(guest73):
    """Path of a dump of ``guest73``, path of its vmlinux, and the workload's document."""
    with dumped(guest73) as core:
        yield core


@pytest.fixture(scope="session")
def core_legacy(legacy_guest):
    """The same of ``legacy_guest``."""
    with dumped(legacy_guest) as core:
        yield core
