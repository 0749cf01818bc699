# SPDX-License-Identifier: GPL-2.0-only
"""A kernel's headers, as bcc wants them: ``build`` and ``source`` among the kernel's modules."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from kvirt.lab import apt
from kvirt.lab.cache import built
from kvirt.lab.progress import Report

# Where a guest has them: /lib/modules/RELEASE/NAME. Compilers look into both.
FLAVOUR, COMMON = "build", "source"


def packages(release: str) -> dict[str, str]:
    """Return Debian's package for each of the two directories of a kernel's headers."""
    # The headers that all flavours of a version share are named by the version alone.
    version = re.sub(r"(-cloud)?-amd64$", "", release)
    return {FLAVOUR: f"linux-headers-{release}", COMMON: f"linux-headers-{version}-common"}


def has_headers(modules: Path) -> bool:
    """Say whether the headers are among a kernel's modules already."""
    return (modules / FLAVOUR).is_dir() and (modules / COMMON).is_dir()


def fetch_headers(suite: apt.Suite, release: str, modules: Path, report: Report) -> None:
    """Fetch the headers of a kernel from the suite it comes from, and put them among its modules."""
    wanted = packages(release)
    for package in wanted.values():
        suite.need(package)
    for name, package in wanted.items():
        if (modules / name).is_dir():
            continue
        with built(modules / name) as directory:
            scratch = directory / "download"
            apt.unpack(suite.download(package, scratch, report, "headers"), scratch)
            for entry in (scratch / "usr" / "src" / package).iterdir():
                entry.rename(directory / entry.name)
            shutil.rmtree(scratch)
