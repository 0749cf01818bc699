# SPDX-License-Identifier: GPL-2.0-only
"""Kernels are chosen by version, and read from the files that they come in."""

import pytest

from kvirt.errors import KvirtError
from kvirt.lab import headers, kernels
from kvirt.lab.kernels import Candidate, Flavour, Kernel


@pytest.mark.parametrize(
    ("pattern", "version", "expected"),
    [
        ("7.3", "7.3.4+deb13-cloud-amd64", True),
        ("7.3", "7.3-1~exp1", True),
        ("7.3", "7.30.1+deb13-cloud-amd64", False),
        ("7", "7.3.4+deb13-cloud-amd64", True),
        ("7.3.4", "7.3.4+deb13-cloud-amd64", True),
        ("7.3.4", "7.3.41+deb13-cloud-amd64", False),
        ("6.1", "6.12.107+deb13-cloud-amd64", False),
        ("7.3.4+deb13-cloud-amd64", "7.3.4+deb13-cloud-amd64", True),
    ],
)
def test_a_pattern_is_whole_numbers(pattern, version, expected):
    assert kernels.matches(pattern, version) is expected


def test_the_newest_is_by_number_and_not_by_letter():
    found = [Candidate(f"7.2.{n}+deb14-cloud-amd64", "sid", f"7.2.{n}-1") for n in (9, 13, 6)]
    best = kernels.newest("7.2", found)
    assert best is not None
    assert best.release == "7.2.13+deb14-cloud-amd64"
    assert kernels.newest("7.3", found) is None


def test_a_release_candidate_is_older_than_its_release():
    found = [Candidate("7.4-rc3", "sid", "7.4~rc3-1~exp1"), Candidate("7.4", "sid", "7.4-1~exp1")]
    best = kernels.newest("7.4", found)
    assert best is not None
    assert best.release == "7.4"


def test_where_the_release_has_no_patch_level_the_package_has():
    found = [Candidate("6.1.0-50-cloud-amd64", "bookworm", "6.1.192-1")]
    assert kernels.newest("6.1.192", found) == found[0]
    assert kernels.newest("6.1", found) == found[0]


def test_only_kernels_with_debug_information_are_offered():
    names = [
        "linux-image-7.3.4+deb13-cloud-amd64-dbg",
        "linux-image-7.3.4+deb13-cloud-amd64",
        "linux-image-7.3.4+deb13-amd64-dbg",
        "linux-image-cloud-amd64-dbg",
        "linux-image-7.2.9+deb13-cloud-amd64",
        "linux-image-6.1.0-50-cloud-amd64-dbg",
    ]
    assert kernels.offered(names, kernels.FLAVOUR) == ["7.3.4+deb13-cloud-amd64", "6.1.0-50-cloud-amd64"]
    assert kernels.offered(names, Flavour("amd64", "amd64")) == ["7.3.4+deb13-amd64"]


@pytest.mark.parametrize(
    ("flavour", "release", "expected"),
    [
        ("cloud-amd64", "7.3.4+deb13-cloud-amd64", True),
        ("cloud-amd64", "6.1.0-50-cloud-amd64", True),
        ("cloud-amd64", "7.4-rc3-cloud-amd64", True),
        ("cloud-amd64", "7.3.4+deb13-cloud-arm64", False),
        ("amd64", "7.3.4+deb13-cloud-amd64", False),
        ("amd64", "6.1.0-50-rt-amd64", False),
        ("arm64-16k", "7.3.4+deb13-arm64-16k", True),
        ("arm64", "7.3.4+deb13-arm64-16k", False),
    ],
)
def test_a_release_is_of_one_flavour(flavour, release, expected):
    assert Flavour(flavour, "any").has(release) is expected


def bz_image(path, version=b"7.3.4-mine (me@here) #1 SMP\0"):
    head = bytearray(0x4000)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x3000 - 0x200).to_bytes(2, "little")
    head[0x3000 : 0x3000 + len(version)] = version
    path.write_bytes(head)
    return path


def test_a_kernel_of_ones_own_says_its_release(tmp_path):
    image = bz_image(tmp_path / "bzImage")
    kernel = Kernel.from_files(image, tmp_path / "vmlinux")
    assert kernel == Kernel("7.3.4-mine", image, tmp_path / "vmlinux", None)


def test_what_is_no_kernel_is_refused(tmp_path):
    text = tmp_path / "text"
    text.write_text("not a kernel")
    with pytest.raises(KvirtError, match="not a bzImage"):
        kernels.image_release(text)
    with pytest.raises(KvirtError, match="cannot be read"):
        kernels.image_release(tmp_path / "missing")
    with pytest.raises(KvirtError, match="does not say"):
        kernels.image_release(bz_image(tmp_path / "unnamed", b"\0"))


def test_a_cached_kernel_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIRT_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "_find", lambda *_: pytest.fail("asked the mirror"))
    directory = tmp_path / "kernels" / "7.3.4+deb13-cloud-amd64"
    for name in ("build", "source"):
        (directory / "modules" / name).mkdir(parents=True)
    (directory / "kernel.json").write_text(
        '{"release": "7.3.4+deb13-cloud-amd64", "version": "7.3.4-1", "suite": "sid"}'
    )
    found = kernels.get_kernel("7.3")
    assert (found.vmlinux, found.initramfs) == (directory / "vmlinux", None)
    assert kernels.fetch_kernel("7.3", kernels.FLAVOUR) == found
    with pytest.raises(pytest.fail.Exception, match="asked the mirror"):
        kernels.fetch_kernel("7.3", Flavour("cloud-arm64", "arm64"))


def test_what_a_kernel_starts_with_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIRT_CACHE", str(tmp_path))
    directory = tmp_path / "kernels" / "6.1.0-50-cloud-amd64"
    for name in ("build", "source", "kernel/fs/fuse"):
        (directory / "modules" / name).mkdir(parents=True)
    (directory / "modules/kernel/fs/fuse/virtiofs.ko").touch()
    (directory / "kernel.json").write_text(
        '{"release": "6.1.0-50-cloud-amd64", "version": "6.1.192-1", "suite": "bookworm"}'
    )
    built = []

    def build(modules, target, report):
        built.append(modules)
        target.touch()

    monkeypatch.setattr(kernels.initramfs, "build", build)
    for _ in range(2):
        assert kernels.get_kernel("6.1").initramfs == directory / "initramfs.cpio"
    assert built == [directory / "modules"]
    assert kernels.fetch_kernel("6.1", kernels.FLAVOUR).initramfs is None


def test_headers_are_named_as_debian_names_them():
    assert headers.packages("7.3.4+deb13-cloud-amd64") == {
        "build": "linux-headers-7.3.4+deb13-cloud-amd64",
        "source": "linux-headers-7.3.4+deb13-common",
    }


def test_a_pattern_that_is_no_version_is_refused_before_any_download(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIRT_CACHE", str(tmp_path))
    with pytest.raises(KvirtError, match="neither a kernel version"):
        kernels.get_kernel("newest")
