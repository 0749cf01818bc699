# SPDX-License-Identifier: GPL-2.0-only
"""A kernel's source, out of a package like Debian's."""

import shutil
import subprocess
import tarfile

import pytest

from kvirt.errors import KvirtError
from kvirt.lab.progress import silent
from kvirt.lab.source import fetch_source, source_version

FILES = ("Makefile", "tools/mm/Makefile", "tools/lib/api/fs.c", "mm/rmap.c")
CONTROL = (
    "Package: linux-source-7.3\nVersion: 7.3.4-1\nArchitecture: all\nMaintainer: x <x@x.x>\nDescription: x\n"
)


class Suite:
    """A suite that has one package."""

    def __init__(self, scratch):
        self.needed = []
        self._scratch = scratch

    def need(self, package):
        self.needed.append(package)

    def download(self, package, directory, report, what):
        tree, top = self._scratch / "deb", self._scratch / package
        for name in FILES:
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_text(name)
        for name in ("DEBIAN", "usr/src"):
            (tree / name).mkdir(parents=True)
        (tree / "DEBIAN" / "control").write_text(CONTROL)
        with tarfile.open(tree / f"usr/src/{package}.tar.xz", "w:xz") as archive:
            archive.add(top, package)
        file = directory / f"{package}.deb"
        directory.mkdir(parents=True)
        subprocess.run(["dpkg-deb", "-b", tree, file], check=True, capture_output=True)
        return file


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="This machine has no dpkg-deb: install dpkg.")
@pytest.mark.parametrize(
    ("parts", "wanted"), [(("*",), FILES), (("tools/mm/*", "tools/lib/*"), FILES[1:3])], ids=["all", "some"]
)
def test_what_is_wanted_of_it_is_there_and_nothing_else(tmp_path, parts, wanted):
    suite, target = Suite(tmp_path), tmp_path / "source"
    fetch_source(suite, "7.3", target, silent, parts)
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == set(wanted)
    assert suite.needed == ["linux-source-7.3"]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="This machine has no dpkg-deb: install dpkg.")
def test_what_it_does_not_have_is_no_source(tmp_path):
    with pytest.raises(KvirtError, match=r"linux-source-7\.3\.tar\.xz cannot be unpacked .*nowhere"):
        fetch_source(Suite(tmp_path), "7.3", tmp_path / "source", silent, ("nowhere/*",))


@pytest.mark.parametrize("release", ["7.3.4+deb13-cloud-amd64", "7.3-rc2-amd64", "7.3"])
def test_the_version_of_a_release(release):
    assert source_version(release) == "7.3"
