# SPDX-License-Identifier: GPL-2.0-only
"""bcc's compiler, spared what it does not need to know."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from kvirt.trace.symbols import KALLSYMS

# include/uapi/linux/sched.h and include/uapi/linux/mount.h
CLONE_NEWNS = 0x20000
MS_BIND = 1 << 12
MS_REC = 1 << 14
MS_PRIVATE = 1 << 18


def compile_programs(bcc: ModuleType, text: str, cflags: Sequence[str]) -> Any:
    """Compile with bcc while it sees no symbols of the kernel; return a ``bcc.BPF``.

    To learn whether there is a bpf_probe_read_kernel() bcc makes a table of all symbols, which takes it as
    long as all the rest (``BFrontendAction::DoMiscWorkAround()``); bpf/kvirt.h knows. They are hidden in a
    thread that has mounts of its own: nobody else notices, and these mounts end with it. Where that is not
    allowed, it takes longer.

    :raises Exception: as ``bcc.BPF()`` does
    """
    compiled: list[Any] = []
    errors: list[Exception] = []
    ended = threading.Event()

    def work() -> None:
        _hide(KALLSYMS)
        try:
            compiled.append(bcc.BPF(text=text, cflags=[*cflags]))
        except Exception as error:
            errors.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=work)
    try:
        thread.start()
        ended.wait()
    finally:
        # A signal's handler may have raised, also while the thread started, and the compiler cannot be
        # interrupted. Nor may join() be: Python 3.11 then takes the thread for ended.
        if thread.ident is not None:
            ended.wait()
            thread.join()
    if errors:
        raise errors[0]
    return compiled[0]


def _hide(path: Path) -> None:
    """Have a file be empty for this thread, and only for it, if the kernel lets it."""
    libc = ctypes.CDLL(None)
    own = libc.unshare(CLONE_NEWNS) == 0
    if own and libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None) == 0:
        libc.mount(b"/dev/null", os.fsencode(path), None, ctypes.c_ulong(MS_BIND), None)
