# SPDX-License-Identifier: GPL-2.0-only
"""What tracing needs of the machine: asked before anything is compiled, and told in one sentence."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from kvirt.errors import KvirtError

# include/uapi/linux/capability.h
CAP_SYS_ADMIN = 21
# include/uapi/linux/nsfs.h: the inode of the namespace that the kernel starts with.
USER_NS_INIT_INO = 0xEFFFFFFD


def check(root: Path = Path("/")) -> None:
    """Make sure that BPF programs can be loaded and attached to functions here, and will be called.

    :param root: where proc, sys and lib are
    :raises KvirtError: if something is missing or forbidden
    """
    _check_privileges(root)
    _check_kprobes(root)
    _check_bpf(root)
    _check_lockdown(root)
    _check_headers(root)


def load_bcc() -> ModuleType:
    """Import bcc.

    :raises KvirtError: if it is not there, or is another package of this name
    """
    package = "python3-bpfcc (so it is called in Debian; elsewhere python3-bcc or bcc)"
    install = f"install {package}"
    if sys.prefix != sys.base_prefix:
        install += ", and make this virtual environment anew with --system-site-packages"
    try:
        bcc = importlib.import_module("bcc")
    except ModuleNotFoundError as error:
        if error.name != "bcc":
            raise KvirtError(f"bcc cannot be imported, because {error.name} is missing: {install}.") from None
        raise KvirtError(f"Tracing needs bcc, which is not installed: {install}.") from None
    except (ImportError, OSError) as error:
        # The module is there, and its library or the compiler's is not.
        raise KvirtError(f"bcc cannot be imported ({error}): {install}.") from None
    if not hasattr(bcc, "BPF"):
        raise KvirtError(
            f"The bcc in {_place(bcc)} is not the BPF compiler, but an unrelated package that has its name "
            f"on PyPI: remove it with 'pip uninstall bcc', and {install}."
        )
    return bcc


def _place(module: ModuleType) -> str:
    return str(Path(module.__file__).parent) if module.__file__ else next(iter(module.__path__), "sys.path")


def _check_privileges(root: Path) -> None:
    status = (root / "proc/self/status").read_text(errors="replace")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    # Whoever makes a user namespace has all capabilities, in there.
    namespace = root / "proc/self/ns/user"
    first = not namespace.exists() or namespace.stat().st_ino == USER_NS_INIT_INO
    if first and int(fields["CapEff"], 16) >> CAP_SYS_ADMIN & 1:
        return
    if int(fields["Uid"].split()[1]) != 0:
        raise KvirtError("Tracing the kernel needs root: run kvirt again with sudo.")
    raise KvirtError(
        "Root may not trace the kernel here, because it lacks CAP_SYS_ADMIN, as in a container or a user "
        "namespace: run kvirt outside of it."
    )


def _check_kprobes(root: Path) -> None:
    devices = root / "sys/bus/event_source/devices"
    if not (devices / "kprobe").exists():
        if not devices.exists():
            raise KvirtError("/sys is not mounted: mount it with 'mount -t sysfs none /sys'.")
        raise KvirtError(
            "This kernel has no kprobes, and so no function of it can be traced: it needs CONFIG_KPROBES=y "
            "and CONFIG_KPROBE_EVENTS=y."
        )


def _check_bpf(root: Path) -> None:
    # Made by what is built for bpf(2) alone, for its file system (kernel/bpf/inode.c, bpf_init()).
    if not (root / "sys/fs/bpf").exists():
        raise KvirtError("This kernel runs no BPF programs: it needs CONFIG_BPF_SYSCALL=y.")


def switched_off(single: bool, root: Path = Path("/")) -> list[str]:
    """Return a sentence for each reason why probes that are attached are not called.

    :param single: whether there are kprobes of one function among them: others have nothing to do with that
        switch
    """
    switches = {"proc/sys/kernel/ftrace_enabled": "Tracing of functions is"}
    if single:
        switches["sys/kernel/debug/kprobes/enabled"] = "Kprobes are"
    sentences = []
    for path, what in switches.items():
        # Without debugfs nobody can have turned them off, unless it was unmounted since.
        with suppress(OSError):
            if (root / path).read_text().strip() == "0":
                sentences.append(
                    f"{what} turned off, and not everything is counted: turn it on with 'echo 1 > /{path}'."
                )
    return sentences


def _check_lockdown(root: Path) -> None:
    # The mode [integrity] forbids neither (enum lockdown_reason, include/linux/security.h). Where securityfs
    # is not mounted, loading will fail, and say so.
    with suppress(OSError):
        if "[confidentiality]" in (root / "sys/kernel/security/lockdown").read_text():
            raise KvirtError(
                "The kernel is locked down, and BPF programs may not read its memory: boot without "
                "lockdown=confidentiality (lockdown=integrity does no harm)."
            )


def _check_headers(root: Path) -> None:
    """As bcc looks for them: it takes types from them even for programs that include nothing of mm."""
    release = (root / "proc/sys/kernel/osrelease").read_text().strip()
    modules = root / "lib/modules" / release
    if "BCC_KERNEL_SOURCE" in os.environ or (root / "sys/kernel/kheaders.tar.xz").exists():
        return
    directory = next((modules / name for name in ("source", "build") if (modules / name).is_dir()), None)
    install = f"install the package linux-headers-{release}"
    if directory is None:
        raise KvirtError(
            f"The kernel's headers, which bcc compiles with, are not in /lib/modules/{release}/build: "
            f"{install}."
        )
    if not (directory / "include/linux/kconfig.h").exists():
        raise KvirtError(
            f"There are no kernel headers in /lib/modules/{release}/{directory.name}, which bcc compiles "
            f"with: {install}."
        )
