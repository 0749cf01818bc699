# SPDX-License-Identifier: GPL-2.0-only
"""``page-types`` of the kernel's tools/mm, built from the source of the kernel that it is to run on."""

from __future__ import annotations

import shutil
from pathlib import Path

from kvirt.errors import KvirtError
from kvirt.lab import apt, host
from kvirt.lab.cache import built, cache_dir, locked
from kvirt.lab.kernels import Kernel
from kvirt.lab.progress import Report, step
from kvirt.lab.source import fetch_source, source_version

PROGRAM = "page-types"
# What of the source it is built from.
PARTS = ("tools/mm/*", "tools/lib/*", "tools/include/*", "tools/scripts/*", "tools/build/*", "include/uapi/*")


def page_types(kernel: Kernel, report: Report) -> Path:
    """Return the program, statically linked: built once, and kept in the cache.

    :param kernel: one of Debian's
    """
    version = source_version(kernel.release)
    target = cache_dir() / f"tools-{version}"
    with locked(target.name):
        if not (target / PROGRAM).exists():
            with built(target) as directory:
                _build(apt.Suite(kernel.suite), version, directory, report)
    return target / PROGRAM


def _build(suite: apt.Suite, version: str, directory: Path, report: Report) -> None:
    source = directory / "source"
    fetch_source(suite, version, source, report, PARTS)
    with step(report, f"Building {PROGRAM}", "source: building"):
        tools = source / "tools" / "mm"
        done = host.run([host.program("make"), "-C", tools, PROGRAM, "CC=cc -static"])
        if done.returncode != 0:
            raise KvirtError(
                f"{PROGRAM} of the kernel's tools cannot be built ({done.stderr.strip()[-500:]}): install "
                "gcc, make and libc6-dev, and try again."
            )
        (tools / PROGRAM).rename(directory / PROGRAM)
        shutil.rmtree(source)
