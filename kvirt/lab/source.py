# SPDX-License-Identifier: GPL-2.0-only
"""The source of Debian's kernels."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from kvirt.errors import KvirtError
from kvirt.lab import apt, host
from kvirt.lab.progress import Report, step


def source_version(release: str) -> str:
    """Return the version whose source a release is built from, as Debian's packages name it."""
    [version] = re.findall(r"^\d+\.\d+", release)
    return str(version)


def fetch_source(
    suite: apt.Suite, version: str, directory: Path, report: Report, parts: Sequence[str] = ("*",)
) -> None:
    """Fetch a kernel's source from the suite that it comes from.

    :param directory: has the source's own directories and files afterwards
    :param parts: patterns of what is wanted of these
    """
    package = f"linux-source-{version}"
    suite.need(package)
    scratch = directory / "download"
    file = suite.download(package, scratch, report, "source")
    with step(report, f"Unpacking {package}", "source: unpacking"):
        apt.unpack(file, scratch)
        [archive] = (scratch / "usr" / "src").glob(f"{package}.tar.*")
        tar = [host.program("tar"), "-C", str(directory), "--strip-components=1", "-xf", str(archive)]
        done = host.run([*tar, "--wildcards", *(f"{package}/{part}" for part in parts)])
        if done.returncode != 0:
            raise KvirtError(
                f"{archive.name} cannot be unpacked ({done.stderr.strip()[-500:]}): is there space for it in "
                f"{directory}?"
            )
        shutil.rmtree(scratch)
