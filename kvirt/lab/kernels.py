# SPDX-License-Identifier: GPL-2.0-only
"""Kernels to boot: Debian's, found by version and fetched once, or one of your own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from kvirt.errors import KvirtError
from kvirt.lab import apt, defaults, headers, host, initramfs
from kvirt.lab.cache import built, cache_dir, locked
from kvirt.lab.progress import Report, silent, step

# In the order of trying; the first that has a match is used. The first is small and has the newest
# kernels that were built for a release; the lists of the others are ten megabytes each.
SUITES = ("trixie-backports", "trixie", "sid", "forky", "bookworm-backports", "bookworm")
# Where a suite has the bootable image, in the order of preference: recent kernels have it in a
# package of its own, and the signed one arrives later than the others.
IMAGE_PACKAGES = (
    "linux-binary-{}",
    "linux-binary-unsigned-{}",
    "linux-image-{}",
    "linux-image-{}-unsigned",
)


@dataclass(frozen=True)
class Flavour:
    """One of the kernels that Debian builds of a version."""

    name: str
    architecture: str
    """Debian's name of it."""

    def has(self, release: str) -> bool:
        """Whether a release is of this flavour: 7.3.4+deb13-cloud-amd64 is of none but cloud-amd64."""
        return re.fullmatch(rf"\d[^-]*(-(rc)?\d+)*-{re.escape(self.name)}", release) is not None


# The cloud flavour has virtiofs and virtio-console built in, and the smallest debug package.
FLAVOUR = Flavour("cloud-amd64", "amd64")


@dataclass(frozen=True)
class Kernel:
    """A kernel that the lab can boot."""

    release: str
    image: Path
    vmlinux: Path | None = None
    """The same kernel with debug information."""
    modules: Path | None = None
    """What the guest has as ``/lib/modules/RELEASE``."""
    initramfs: Path | None = None
    """What it starts with, if it cannot mount the guest's root by itself."""
    suite: str = ""
    """Where it is from, if it is Debian's."""

    @classmethod
    def from_files(cls, image: Path, vmlinux: Path | None) -> Kernel:
        """Take a kernel built by its user: a bzImage, and the vmlinux of the same build."""
        return cls(
            release=image_release(image),
            image=image.absolute(),
            # Its directory is mounted in the guest, where a link might lead nowhere.
            vmlinux=None if vmlinux is None else vmlinux.resolve(),
        )


@dataclass(frozen=True)
class Candidate:
    """A kernel that a suite offers."""

    release: str
    suite: str
    version: str = ""


def image_release(image: Path) -> str:
    """Read the release out of a bzImage's header (Documentation/arch/x86/boot.rst)."""
    try:
        with image.open("rb") as file:
            head = file.read(0x8000)
    except OSError as error:
        raise KvirtError(
            f"The kernel image {image} cannot be read ({error.strerror}): name a bzImage, or a "
            f"version such as {defaults.KERNEL} to fetch Debian's."
        ) from error
    if head[0x202:0x206] != b"HdrS":
        raise KvirtError(
            f"{image} is not a bzImage: name arch/x86/boot/bzImage of a build tree, or a vmlinuz."
        )
    # kernel_version: a pointer, less 0x200, to a string that begins with the release.
    start = int.from_bytes(head[0x20E:0x210], "little") + 0x200
    text = head[start : head.find(b"\0", start)].decode("ascii", errors="replace")
    if not text.split():
        raise KvirtError(f"{image} does not say which release it is: rebuild it, or name another.")
    return text.split()[0]


def version_key(version: str) -> tuple[tuple[int, ...], str]:
    """Order releases and package versions by their numbers: 7.10 is newer than 7.9."""
    upstream = re.match(r"[\d.]+", version)
    numbers = tuple(int(n) for n in upstream[0].split(".") if n) if upstream else ()
    # A tilde sorts before everything: a release candidate is older than its release.
    rest = version[upstream.end() :] if upstream else version
    return numbers + ((-1,) if rest.startswith("~rc") else (0,)), rest


def matches(pattern: str, version: str) -> bool:
    """Say whether a version is one of the pattern's: 7.3 means 7.3 and 7.3.x, never 7.30."""
    return version == pattern or re.match(re.escape(pattern) + r"(?![\d])", version) is not None


def offered(names: Iterable[str], flavour: Flavour) -> list[str]:
    """Pick a flavour's releases with debug information out of a suite's package names."""
    found = map(re.compile("linux-image-(.*)-dbg").fullmatch, names)
    return [match[1] for match in found if match is not None and flavour.has(match[1])]


def newest(pattern: str, candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the newest candidate that matches, by the release's name or the package's version."""
    fitting = [c for c in candidates if matches(pattern, c.release) or matches(pattern, c.version)]
    return max(fitting, key=lambda c: version_key(c.version or c.release), default=None)


def get_kernel(pattern: str = defaults.KERNEL, report: Report = silent, *, update: bool = False) -> Kernel:
    """Return the newest Debian kernel that matches a version; fetch it if it is not in the cache.

    With ``update`` the mirror is asked for a newer one even if the cache has a match.
    """
    found = None if update else newest(pattern, _cached(FLAVOUR))
    if found is None or not _is_whole(found.release):
        with locked("kernels"):
            found = _get(pattern, FLAVOUR, report, update=update)
            modules, early = _modules(found.release), _initramfs(found.release)
            if not headers.has_headers(modules):
                headers.fetch_headers(apt.Suite(found.suite), found.release, modules, report)
            if early is not None and not early.exists():
                initramfs.build(modules, early, report)
    return replace(_load(found), initramfs=_initramfs(found.release))


def fetch_kernel(pattern: str, flavour: Flavour, report: Report = silent) -> Kernel:
    """Return the newest Debian kernel of a flavour that matches a version, without what guests here need.

    It is fetched if it is not in the cache.
    """
    with locked("kernels"):
        return _load(_get(pattern, flavour, report, update=False))


def _get(pattern: str, flavour: Flavour, report: Report, *, update: bool) -> Candidate:
    """Find a kernel in the cache, or fetch it. Another kvirt may have done so while this one waited."""
    found = None if update else newest(pattern, _cached(flavour))
    if found is None:
        found = _find(pattern, flavour, report)
        if not (_directory(found.release) / "kernel.json").exists():
            _fetch(found, flavour, report)
    return found


def _directory(release: str) -> Path:
    return cache_dir() / "kernels" / release


def _cached(flavour: Flavour) -> list[Candidate]:
    found = []
    for path in (cache_dir() / "kernels").glob("*/kernel.json"):
        document = json.loads(path.read_text())
        if flavour.has(document["release"]):
            found.append(Candidate(document["release"], document["suite"], document["version"]))
    return found


def _modules(release: str) -> Path:
    return _directory(release) / "modules"


def _initramfs(release: str) -> Path | None:
    """What a kernel starts with, which may have to be built yet; None if it starts without."""
    return _directory(release) / "initramfs.cpio" if initramfs.is_needed(_modules(release)) else None


def _is_whole(release: str) -> bool:
    """Whether everything that a kernel is booted with is in the cache."""
    early = _initramfs(release)
    return headers.has_headers(_modules(release)) and (early is None or early.exists())


def _load(found: Candidate) -> Kernel:
    directory, modules = _directory(found.release), _modules(found.release)
    return Kernel(found.release, directory / "vmlinuz", directory / "vmlinux", modules, suite=found.suite)


def _find(pattern: str, flavour: Flavour, report: Report) -> Candidate:
    if not re.match(r"\d", pattern):
        raise KvirtError(
            f"{pattern!r} is neither a kernel version such as {defaults.KERNEL} nor a file: name one of them."
        )
    with step(report, f"Looking for Linux {pattern} in Debian", "kernel") as detail:
        for name in SUITES:
            detail(name)
            suite = apt.Suite(name, flavour.architecture)
            suite.update()
            candidates = []
            for release in offered(suite.names("linux-image-"), flavour):
                version = suite.version(f"linux-image-{release}-dbg")
                candidates.append(Candidate(release, name, version))
            best = newest(pattern, candidates)
            if best is not None:
                report(f"Found Linux {best.release} ({best.version}) in {name}")
                return best
    raise KvirtError(
        f"No {flavour.name} kernel {pattern} with debug information is in Debian's {', '.join(SUITES)}: "
        "name another version, or give your own with --kernel bzImage --vmlinux vmlinux."
    )


def _fetch(candidate: Candidate, flavour: Flavour, report: Report) -> None:
    release = candidate.release
    suite = apt.Suite(candidate.suite, flavour.architecture)
    names = set(suite.names("linux-"))
    image = next((n for p in IMAGE_PACKAGES if (n := p.format(release)) in names), None)
    if image is None:
        raise KvirtError(
            f"Debian's {candidate.suite} has debug information but no image of Linux {release}: "
            "name another version."
        )
    packages = [image, f"linux-modules-{release}", f"linux-image-{release}-dbg"]
    with built(_directory(release)) as directory:
        download = directory / "download"
        files = {}
        for package in packages:
            if package not in names:
                continue  # Older kernels have the modules in the package of the image.
            files[package] = suite.download(package, download, report, "kernel")
        with step(report, f"Unpacking Linux {release}", "kernel: unpacking") as detail:
            debug = files.pop(packages[-1])
            for file in files.values():
                unpack(file, directory, release)
            unpack_vmlinux(debug, directory / "vmlinux", release, detail)
            shutil.rmtree(download)
            _index_modules(directory, release)
        document = {"release": release, "version": candidate.version, "suite": candidate.suite}
        (directory / "kernel.json").write_text(json.dumps(document) + "\n")


def unpack(package: Path, directory: Path, release: str) -> None:
    """Unpack the image and the modules of one package into ``directory``."""
    scratch = directory / "unpacked"
    apt.unpack(package, scratch)
    modules = scratch / "usr" / "lib" / "modules" / release
    if not modules.is_dir():
        modules = scratch / "lib" / "modules" / release
    for image in (scratch / "boot" / f"vmlinuz-{release}", modules / "vmlinuz"):
        if image.is_file():
            image.rename(directory / "vmlinuz")
    if (modules / "kernel").is_dir():
        modules.rename(directory / "modules")
    shutil.rmtree(scratch)


def unpack_vmlinux(package: Path, target: Path, release: str, detail: Callable[[str], None] = silent) -> None:
    """Take the vmlinux out of a debug package, and read no further than it."""
    wanted = {
        f"./usr/lib/debug/boot/vmlinux-{release}",
        f"./usr/lib/debug/lib/modules/{release}/vmlinux",
    }
    child = host.start([host.program("dpkg-deb"), "--fsys-tarfile", package], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        with tarfile.open(fileobj=child.stdout, mode="r|") as archive:
            for member in archive:
                if member.name in wanted and member.isreg():
                    source = archive.extractfile(member)
                    assert source is not None
                    with target.open("wb") as file:
                        _copy(source, file, member.size, detail)
                    return
    except tarfile.TarError as error:
        raise KvirtError(f"{package.name} cannot be unpacked ({error}): try again.") from error
    finally:
        host.end(child)
    raise KvirtError(f"{package.name} has no vmlinux of {release}: name another version.")


def _copy(source: IO[bytes], target: IO[bytes], size: int, detail: Callable[[str], None]) -> None:
    done = 0
    while chunk := source.read(1 << 22):
        target.write(chunk)
        done += len(chunk)
        detail(f"vmlinux {100 * done / size:.0f} %")


def _index_modules(directory: Path, release: str) -> None:
    # depmod wants the tree as it is when installed; modprobe in the guest wants depmod's files.
    base = directory / "base" / "lib" / "modules"
    base.mkdir(parents=True)
    (base / release).symlink_to(directory / "modules")
    done = host.run([host.program("depmod"), "-b", directory / "base", release])
    shutil.rmtree(directory / "base")
    if done.returncode != 0:
        raise KvirtError(f"depmod failed on Linux {release} ({done.stderr.strip()}): try again.")
