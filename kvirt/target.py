# SPDX-License-Identifier: GPL-2.0-only
"""Opens what the user pointed at: the running kernel, a vmcore, or a QEMU guest from outside."""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import drgn

from kvirt.architecture import check_architecture
from kvirt.aside import Aside
from kvirt.blocks import needs_blocks, open_blocks
from kvirt.elfcore import read_elf_core
from kvirt.errors import KvirtError
from kvirt.filtered import mark_filtered
from kvirt.kdump import read_kdump
from kvirt.pause import Pause, connect

if TYPE_CHECKING:
    from kvirt.btf import Btf
    from kvirt.finders import Symbols
    from kvirt.layout import Layout

# drgn reports what it looked for and missed through this logger. What matters of it is said by the
# sentences below; the rest would stand between a user and the result.
logging.getLogger("drgn").setLevel(logging.CRITICAL)


# What libkdumpfile says of kdump-compressed cores that do not name their architecture, as QEMU's do not. Then
# the kernel's own words tell it, or else it is taken for the most frequent one: nothing in a core of another
# would make sense as such.
_NO_ARCHITECTURE = "KDUMP_ATTR_ARCH_NAME"


class Kind(enum.StrEnum):
    """What a target is."""

    LIVE = "live"
    CORE = "core"
    QEMU = "qemu"


@dataclass(frozen=True)
class Target:
    """An opened kernel."""

    prog: drgn.Program
    kind: Kind
    types: str
    """"dwarf" or "btf"."""
    location: str
    """What was opened, for people."""
    pause: Pause | None = None
    """Keeps a QEMU guest still as long as it is wanted."""

    @property
    def moves(self) -> bool:
        """Whether the kernel runs while it is read."""
        if self.pause is not None:
            return False
        # /proc/kcore may have been named as a core.
        return self.kind is not Kind.CORE or bool(self.prog.flags & drgn.ProgramFlags.IS_LIVE)


def _main_module(prog: drgn.Program) -> drgn.MainModule:
    # Lazily created, the kernel first: its modules would need type information.
    for module, _ in prog.loaded_modules():
        if isinstance(module, drgn.MainModule):
            return module
    raise KvirtError("drgn found no kernel in what was opened; is it a dump of a Linux kernel?")


def _check_elf_core(path: Path) -> None:
    """Refuse an ELF core whose segments reach past the file's end.

    drgn opens such a core, and every read behind the end fails in a different place.
    """
    core = read_elf_core(path)
    if core is None:
        return
    size = path.stat().st_size
    if core.needed > size:
        raise KvirtError(
            f"{path} is truncated: it should have {core.needed} bytes and has {size}; copy the dump again, "
            "or take a new one with enough disk space."
        )


def _open_core(path: Path) -> drgn.Program:
    prog = drgn.Program()
    try:
        if path.is_fifo():
            raise KvirtError(f"{path} is a pipe: give --core a vmcore in a file.")
        if path.is_file() and path.stat().st_size == 0:
            raise KvirtError(f"{path} is empty: take the dump again, with enough disk space.")
        _check_elf_core(path)
        kdump = read_kdump(path) if path.is_file() else None
        try:
            if needs_blocks(kdump):
                prog = open_blocks(path)
            else:
                prog.set_core_dump(path)
        except Exception as error:
            if _NO_ARCHITECTURE not in str(error):
                raise
            told = None if kdump is None else kdump.architecture
            prog = drgn.Program(drgn.Platform(told or drgn.Architecture.X86_64))
            prog.set_core_dump(path)
        mark_filtered(prog, path)
        return prog
    except FileNotFoundError:
        raise KvirtError(f"{path} does not exist: give --core the path of a vmcore.") from None
    except IsADirectoryError:
        raise KvirtError(f"{path} is a directory: give --core the vmcore file in it.") from None
    except PermissionError:
        raise KvirtError(f"{path} cannot be read by this user: become root or change its mode.") from None
    except KvirtError:
        raise
    except Exception as error:  # drgn passes on what libelf and libkdumpfile say as plain exceptions
        raise KvirtError(
            f"{path} is not a vmcore that drgn can read ({error}): give --core an ELF or "
            "kdump-compressed dump of a Linux kernel."
        ) from None


def _open_live(prog: drgn.Program) -> None:
    try:
        prog.set_kernel()
    except FileNotFoundError:
        raise KvirtError(
            "This machine has no /proc/kcore, so its running kernel cannot be read: boot a kernel with "
            "CONFIG_PROC_KCORE=y, or read a vmcore with --core or a QEMU guest with --qemu."
        ) from None
    except PermissionError:
        if os.geteuid() != 0:
            raise KvirtError("Reading the running kernel needs root: run kvirt again with sudo.") from None
        raise KvirtError(
            "The kernel refuses to open /proc/kcore even for root (lockdown, or a container): boot "
            "without lockdown, or read a vmcore with --core."
        ) from None
    except (OSError, ValueError, LookupError, drgn.FaultError) as error:
        raise KvirtError(
            f"The running kernel cannot be read through /proc/kcore ({error}): read a vmcore with --core."
        ) from None


def _open_qemu(prog: drgn.Program, path: Path) -> socket.socket:
    """Have drgn read a guest; returns the connection, which drgn has too."""
    try:
        # drgn waits for the greeting for ever; QEMU serves one client at a time and lets others wait.
        connection = connect(path, 5)
        prog.set_qemu_qmp(os.dup(connection.fileno()))
    except FileNotFoundError:
        raise KvirtError(
            f"{path} does not exist: start QEMU with -qmp unix:{path},server=on,wait=off "
            "and -device vmcoreinfo."
        ) from None
    except TimeoutError:
        raise KvirtError(
            f"QEMU does not answer on {path}; another client may hold this QMP socket: close it, or give "
            "QEMU a second one."
        ) from None
    except (OSError, ValueError, LookupError, drgn.FaultError) as error:
        if isinstance(error, OSError) and error.errno == errno.ECONNREFUSED:
            raise KvirtError(f"Nobody listens on {path}: is this QEMU still running?") from None
        raise KvirtError(
            f"The guest behind {path} cannot be read ({error}): run QEMU with -device vmcoreinfo, and load "
            "the module qemu_fw_cfg in the guest."
        ) from None
    if not prog.flags & drgn.ProgramFlags.IS_LINUX_KERNEL:
        raise KvirtError(
            f"QEMU answers on {path}, but the guest told it nothing about its kernel: run QEMU with -device "
            "vmcoreinfo, and load the module qemu_fw_cfg in the guest."
        )
    return connection


class _NoDebugInfoError(KvirtError):
    """There is no debug information where it was looked for."""


def _load_dwarf(prog: drgn.Program, symbols: Sequence[Path], finders: Sequence[str] | None = None) -> None:
    """Load the kernel's debug information.

    :param finders: drgn's ways to look for it where no file is named, None for all
    :raises KvirtError: if it cannot be found
    """
    module = _main_module(prog)
    have = drgn.ModuleFileStatus.HAVE
    build_id = module.build_id.hex() if module.build_id else "unknown"
    release = prog["UTS_RELEASE"].string_().decode()
    for path in symbols:
        if not path.exists():
            raise KvirtError(f"{path} does not exist: give --symbols a vmlinux or debug file.")
        if not path.is_file():
            raise KvirtError(f"{path} is not a file: give --symbols a vmlinux or debug file.")
        try:
            module.try_file(path)
        except PermissionError:
            raise KvirtError(f"{path} cannot be read by this user: change its mode.") from None
        except (OSError, ValueError, LookupError) as error:
            raise KvirtError(
                f"{path} is not a usable debug file ({error}): give --symbols the vmlinux with debug "
                f"information of kernel {release}."
            ) from None
    if module.debug_file_status is not have and symbols:
        names = ", ".join(str(p) for p in symbols)
        raise KvirtError(
            f"{names} does not belong to this kernel, or has no debug information: give --symbols the "
            f"vmlinux of kernel {release} with build ID {build_id}."
        )
    if module.debug_file_status is not have:
        if finders is not None:
            prog.set_enabled_debug_info_finders(finders)
        with contextlib.suppress(drgn.MissingDebugInfoError):
            prog.load_module_debug_info(module)
    if module.debug_file_status is not have:
        raise _NoDebugInfoError(
            f"No debug information was found for kernel {release} (build ID {build_id}): install its "
            f"debug package (Debian: linux-image-{release}-dbg), or name its vmlinux with --symbols."
        )


def _learn(prog: drgn.Program) -> tuple[Btf, Symbols, Layout | None]:
    """Use BTF and kallsyms, and learn by them what most commands need to know first."""
    from kvirt.finders import use_btf, used_btf
    from kvirt.layout import layout_of

    use_btf(prog)
    # Those who need it meet the same error, and say it.
    layout = None
    with contextlib.suppress(KvirtError):
        layout = layout_of(prog)
    return *used_btf(prog), layout


def _use_btf(prog: drgn.Program, here: bool, meanwhile: Callable[[], None]) -> None:
    """Use BTF and kallsyms.

    All of it is Python, as is what is to be done meanwhile: only another process can do it beside. That pays
    for the running kernel. To read the symbols of another one takes numpy, which both would have to import.

    :param here: whether it is the running kernel
    """
    if not here or len(os.sched_getaffinity(0)) == 1:
        meanwhile()
        _learn(prog)
        return
    with Aside(partial(_learn, prog)) as aside:
        # Threads are not to be there when processes part.
        meanwhile()
        btf, symbols, layout = aside.result()
    # It takes long to import, and most have debug information.
    from kvirt.finders import FINDER, use_btf
    from kvirt.layout import know_layout

    if FINDER not in prog.registered_type_finders():
        use_btf(prog, btf, symbols)
    if layout is not None:
        know_layout(prog, layout)


def _load_types(prog: drgn.Program, symbols: Sequence[Path], types: str, use_btf: Callable[[], None]) -> str:
    """Find types and symbols, and tell where: "dwarf" or "btf"."""
    if types == "btf":
        if symbols:
            raise KvirtError(
                "--types btf takes types and symbols from the kernel itself: leave out --symbols, or read "
                "the debug file with --types dwarf."
            )
        use_btf()
        return "btf"
    if types == "dwarf" or symbols:
        _load_dwarf(prog, symbols)
        return "dwarf"
    finders = prog.enabled_debug_info_finders()
    try:
        # What is on this machine; a server would have to send hundreds of megabytes.
        _load_dwarf(prog, (), [name for name in finders if name != "debuginfod"])
        return "dwarf"
    except _NoDebugInfoError as error:
        missing = str(error)
    try:
        use_btf()
        return "btf"
    except KvirtError as error:
        without = str(error)
    try:
        _load_dwarf(prog, (), finders)
        return "dwarf"
    except _NoDebugInfoError:
        raise KvirtError(f"{missing} Nor does the kernel tell its types itself: {without}") from None


def open_target(
    core: Path | None = None,
    qemu: Path | None = None,
    symbols: Sequence[Path] = (),
    types: str = "auto",
    *,
    pause: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> Target:
    """Open the kernel of a vmcore, of a QEMU guest, or else the running one, with its types.

    :param pause: stop the QEMU guest until ``target.pause.end()``, or until this process ends
    :param meanwhile: called once it is known where types come from, which takes a while to read: has to
        return at once, and may have started a thread
    :raises KvirtError: if that is not possible; the sentence says why and what to do
    """
    prog = drgn.Program()
    stopped = None
    if core is not None:
        kind, location = Kind.CORE, str(core)
        prog = _open_core(core)
    elif qemu is not None:
        kind, location = Kind.QEMU, str(qemu)
        connection = _open_qemu(prog, qemu)
    else:
        kind, location = Kind.LIVE, "/proc/kcore"
        _open_live(prog)
    if not prog.flags & drgn.ProgramFlags.IS_LINUX_KERNEL:
        raise KvirtError(
            f"{location} is not a dump of a Linux kernel (it has no VMCOREINFO): give --core a vmcore; "
            "QEMU writes a usable one with -device vmcoreinfo and qemu_fw_cfg loaded in the guest."
        )
    check_architecture(prog.platform)
    try:
        # BTF may be tried and refused before debug information is found.
        begin = cache(meanwhile)
        used = _load_types(prog, symbols, types, partial(_use_btf, prog, kind is Kind.LIVE, begin))
        begin()
        # drgn goes through debug information when it is first asked, and lets other threads run meanwhile.
        with contextlib.suppress(LookupError):
            prog.type("struct vm_area_struct")
    except (drgn.FaultError, drgn.BadDataError, LookupError, ValueError) as error:
        raise KvirtError(
            f"{location} cannot be read far enough to find its kernel ({error}): is the dump complete?"
        ) from None
    if core is not None:
        # numpy takes long to import, and may have been by now.
        from kvirt.memory import map_core

        # A file that cannot be mapped is read by drgn alone.
        with contextlib.suppress(OSError):
            map_core(prog, core)
    if qemu is not None and pause:
        # Types take longer than all the rest, and do not change.
        stopped = Pause(connection)
    return Target(prog, kind, used, location, stopped)
