# SPDX-License-Identifier: GPL-2.0-only
"""Where the lab keeps what it has fetched and built, and how several kvirts share it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvirt.errors import KvirtError


def cache_dir() -> Path:
    """Return the lab's directory: ``$KVIRT_CACHE``, else ``kvirt`` in the user's cache directory."""
    named = os.environ.get("KVIRT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(named).absolute() if named else base / "kvirt"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KvirtError(
            f"The lab's cache directory {path} cannot be made ({error.strerror}): "
            "set KVIRT_CACHE to a directory that can be written."
        ) from error
    return path


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock ``name`` against every other kvirt that uses this cache."""
    path = cache_dir() / f".{name}.lock"
    try:
        lock = path.open("w")
    except OSError as error:
        raise KvirtError(
            f"The lab's cache cannot be written ({path}: {error.strerror}): run kvirt as the user "
            "who filled it, or set KVIRT_CACHE to another directory."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def built(target: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes ``target`` if the block succeeds, and nothing if not.

    Call it with the lock of that target held: what an earlier, killed kvirt left is removed.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
