# SPDX-License-Identifier: GPL-2.0-only
"""Whether this machine's KVM runs a guest: /dev/kvm alone does not say so."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from kvirt.lab import host
from kvirt.lab.cache import cache_dir, locked
from kvirt.lab.progress import Report, step

DEVICE = Path("/dev/kvm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# A kernel without a root panics within two seconds where KVM works.
PROBE_SECONDS = 15


def arguments(name: str) -> list[str]:
    """Return QEMU's options for an accelerator."""
    if name == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    # QEMU 7.2 emulates two things wrongly: cmpxchg16b, on which the kernel's allocator relies where it is
    # offered, and some of AVX2, by which numpy sorts. And where rep stosb is said to be fast, the kernel
    # clears pages with it, which is emulated a byte at a time.
    return ["-accel", "tcg,thread=multi", "-cpu", "max,cx16=off,avx=off,erms=off"]


def accelerator(image: Path, report: Report) -> str:
    """Return "kvm" if a guest with this kernel runs on it, else "tcg"."""
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return "tcg"
    verdict = cache_dir() / "accelerator.json"
    boot = BOOT_ID.read_text().strip()
    with locked("accelerator"):
        try:
            known = json.loads(verdict.read_text())
        except (OSError, ValueError):
            known = {}
        if known.get("boot") != boot:
            with step(report, "Trying whether KVM runs a guest here", "KVM"):
                known = {"boot": boot, "accelerator": "kvm" if _runs(image) else "tcg"}
            verdict.write_text(json.dumps(known) + "\n")
            if known["accelerator"] == "tcg":
                report("KVM does not run a guest here: guests are emulated (TCG)")
    return str(known["accelerator"])


def _runs(image: Path) -> bool:
    with tempfile.TemporaryDirectory(prefix="kvirt-probe-") as scratch:
        console = Path(scratch) / "console"
        argv = [host.program("qemu-system-x86_64"), *arguments("kvm"), "-machine", "q35", "-m", "512"]
        argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-serial", f"file:{console}", "-kernel", str(image)]
        argv += ["-append", "console=ttyS0 panic=-1"]
        with (Path(scratch) / "stderr").open("wb") as log:
            child = host.start(argv, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + PROBE_SECONDS
            while time.monotonic() < deadline:
                ended = child.poll() is not None
                said = console.read_bytes() if console.exists() else b""
                if ended or b"Kernel panic" in said:
                    return b"Kernel panic" in said
                # QEMU stays where it is after an internal error of KVM; its message tells.
                if b"KVM internal error" in (Path(scratch) / "stderr").read_bytes():
                    return False
                time.sleep(0.05)
            return False
        finally:
            host.end(child, grace=0.5)
