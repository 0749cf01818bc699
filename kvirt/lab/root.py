# SPDX-License-Identifier: GPL-2.0-only
"""The guest's root: a small Debian with Python and kvirt's dependencies, built once.

Guests mount it read-only, so any number of them can share it. kvirt itself is not in it: the tree it
runs from is mounted beside it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from kvirt.errors import KvirtError
from kvirt.lab import apt, defaults, host
from kvirt.lab.cache import built, cache_dir, locked
from kvirt.lab.progress import Report, silent, step
from kvirt.lab.tree import TREE

# One Debian package a line.
PACKAGES = (
    "bpftool",  # says which BPF programs are loaded, whoever loaded them
    "bpftrace",  # counts what kvirt counts, in its own way
    "kmod",  # modprobe, which knows how to unpack Debian's modules
    "python3",
    "python3-bpfcc",  # the bcc that kvirt trace loads its programs with
)
# Bounds for the guest alone. numpy's wheels from 2.4 on refuse to run without cmpxchg16b, which the
# guest has to do without where QEMU emulates it wrongly (see accel.py).
BOUNDS = ("numpy<2.4",)
# Directories that the guest mounts something on; the root itself is never written to.
MOUNT_POINTS = ("kvirt", "usr/lib/modules", "usr/lib/debug", "var/tmp")
# Compiled Python of everything in the root; that of the tree is kept elsewhere, and written in the guest.
PYCACHE = "usr/local/lib/pycache"
# What nobody reads in a guest.
UNWANTED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")

# The kernel starts this; all that may change from one kvirt to the next is in the tree it mounts.
INIT = """\
#!/bin/sh
mount -t virtiofs -o ro kvirt-tree /kvirt && exec sh /kvirt/kvirt/lab/init.sh
echo "kvirt: the tree could not be mounted" >/dev/console
"""
KVIRT = """\
#!/bin/sh
exec python3 -m kvirt "$@"
"""


def requirements() -> list[str]:
    """Return what kvirt needs from PyPI at run time, as its own metadata say."""
    pyproject = TREE / "pyproject.toml"
    if pyproject.is_file():
        declared: list[str] = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
        return declared
    required = importlib.metadata.requires("kvirt") or []
    return [line for line in required if "extra ==" not in line]


def get_root(report: Report = silent, extra: Sequence[str] = (), suite: str = defaults.SUITE) -> Path:
    """Return the guest's root directory; build it if what it is made from has changed.

    :param extra: Debian packages beside the usual ones; such a root is another one
    :param suite: the Debian to build it of. What has been built stays as it is, though sid moves on
    """
    packages = (*PACKAGES, *extra)
    recipe = [suite, packages, MOUNT_POINTS, PYCACHE, UNWANTED, INIT, KVIRT, requirements(), BOUNDS]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    root = cache_dir() / f"root-{suite}-{key}"
    if root.is_dir():
        return root
    host.require_root("Building the guest's root")
    with locked("root"):
        if not root.is_dir():
            with built(root) as directory:
                _build(directory, suite, packages, report)
    return root


def _build(directory: Path, suite: str, packages: Sequence[str], report: Report) -> None:
    with step(report, f"Building the guest's root (Debian {suite})", "root") as detail:
        detail("mmdebstrap")
        _debootstrap(directory, suite, packages)
        for point in MOUNT_POINTS:
            (directory / point).mkdir(parents=True, exist_ok=True)
        for name, text in (("usr/sbin/kvirt-init", INIT), ("usr/local/bin/kvirt", KVIRT)):
            path = directory / name
            path.write_text(text)
            path.chmod(0o755)
        version = _python_version(directory)
        detail(f"Python {version} packages")
        _install_wheels(directory, version)


def _debootstrap(directory: Path, suite: str, packages: Sequence[str]) -> None:
    argv = [host.program("mmdebstrap"), "--variant=minbase", "--quiet"]
    argv += [f"--include={','.join(packages)}", "--architectures=amd64"]
    argv += [f"--dpkgopt=path-exclude={path}" for path in UNWANTED]
    argv += [f"--aptopt={line}" for line in apt.settings()]
    argv += ["--aptopt=Acquire::Languages none", "--aptopt=Acquire::Check-Valid-Until false"]
    # The guest never asks apt again.
    argv += ["--skip=cleanup/apt", '--customize-hook=rm -rf "$1"/var/lib/apt/lists/*']
    with tempfile.TemporaryDirectory(prefix="kvirt-root-") as scratch:
        sources = Path(scratch) / "mirror.sources"
        sources.write_text(apt.suite_source(suite).deb822())
        argv += [suite, str(directory), str(sources)]
        # It forks, and what it forks would outlive it. What it leaves in the temporary directory goes too.
        _run(
            host.family(argv),
            "mmdebstrap",
            "the suite's name, the mirror and the network",
            {**os.environ, "TMPDIR": scratch},
        )


def _python_version(directory: Path) -> str:
    for path in (directory / "usr" / "bin").glob("python3.*"):
        match = re.fullmatch(r"python(3\.\d+)", path.name)
        if match is not None:
            return match[1]
    raise KvirtError(f"The guest's root in {directory} has no Python: remove it and try again.")


def _install_wheels(directory: Path, version: str) -> None:
    packages = Path("usr/local/lib") / f"python{version}" / "dist-packages"
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Wheels for the guest's Python; this one could not compile for it.
    argv += ["--target", str(directory / packages), "--no-compile", "--only-binary=:all:"]
    argv += ["--python-version", version, *requirements(), *BOUNDS]
    _run(argv, "pip", "this machine's pip configuration and the network")
    for tests in (directory / packages / "numpy").rglob("tests"):
        shutil.rmtree(tests)
    # Where guests look for it (init.sh); there they would compile all of it again after each boot.
    compile_all = ["python3", "-X", f"pycache_prefix=/{PYCACHE}", "-m", "compileall", "-q"]
    compile_all += [f"/{packages}", f"/usr/lib/python{version}"]
    # Not every file of a package is meant for this Python: what does not compile is not imported.
    host.run([host.program("chroot"), str(directory), *compile_all])


def _run(argv: Sequence[str | Path], name: str, check: str, env: dict[str, str] | None = None) -> None:
    with tempfile.TemporaryFile() as log:
        child = host.start(argv, stdout=log, stderr=log, env=env)
        try:
            status = child.wait()
        finally:
            host.end(child)
        if status != 0:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            raise KvirtError(
                f"{name} failed (exit status {status}) while the guest's root was built; check "
                f"{check}. The command was: {shlex.join(map(str, argv))}\n" + "\n".join(lines[-8:])
            )
