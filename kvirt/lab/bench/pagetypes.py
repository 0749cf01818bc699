# SPDX-License-Identifier: GPL-2.0-only
"""``page-types`` of the kernel's tools/mm, built from the source of the kernel that it is to run on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from kvirt.errors import KvirtError
from kvirt.lab import apt, host
from kvirt.lab.cache import built, cache_dir, locked
from kvirt.lab.kernels import Kernel
from kvirt.lab.progress import Report, step

PROGRAM = "page-types"
# What of the source it is built from.
PARTS = ("tools/mm/*", "tools/lib/*", "tools/include/*", "tools/scripts/*", "tools/build/*", "include/uapi/*")


def page_types(kernel: Kernel, report: Report) -> Path:
    """Return the program, statically linked: built once, and kept in the cache.

    :param kernel: one of Debian's
    """
    [version] = re.findall(r"^\d+\.\d+", kernel.release)
    target = cache_dir() / f"tools-{version}"
    with locked(target.name):
        if not (target / PROGRAM).exists():
            with built(target) as directory:
                _build(apt.Suite(kernel.suite), f"linux-source-{version}", directory, report)
    return target / PROGRAM


def _build(suite: apt.Suite, package: str, directory: Path, report: Report) -> None:
    suite.need(package)
    scratch = directory / "scratch"
    file = suite.download(package, scratch, report, "source")
    with step(report, f"Building {PROGRAM}", "source: building"):
        apt.unpack(file, scratch)
        [archive] = (scratch / "usr" / "src").glob("linux-source-*.tar.*")
        patterns = [f"{archive.name.split('.tar')[0]}/{part}" for part in PARTS]
        _run("tar", "-C", scratch, "-xf", archive, "--wildcards", "--strip-components=1", *patterns)
        _run("make", "-C", scratch / "tools" / "mm", PROGRAM, "CC=cc -static")
        (scratch / "tools" / "mm" / PROGRAM).rename(directory / PROGRAM)
        shutil.rmtree(scratch)


def _run(*argv: object) -> None:
    program, *words = map(str, argv)
    done = host.run([host.program(program), *words])
    if done.returncode != 0:
        raise KvirtError(
            f"{PROGRAM} of the kernel's tools cannot be built ({done.stderr.strip()[-500:]}): install gcc, "
            "make and libc6-dev, and try again."
        )
