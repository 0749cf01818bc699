# SPDX-License-Identifier: GPL-2.0-only
"""bpf(2) links that bcc does not know: one probe of many functions."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

# arch/x86/entry/syscalls/syscall_64.tbl
_NR_BPF = {"x86_64": 321}
# include/uapi/linux/bpf.h: enum bpf_cmd, enum bpf_attach_type, and the flag of link_create.kprobe_multi.
BPF_OBJ_GET_INFO_BY_FD = 15
BPF_LINK_CREATE = 28
BPF_TRACE_KPROBE_MULTI = 42
BPF_F_KPROBE_MULTI_RETURN = 1


class _LinkCreate(ctypes.Structure):
    """``union bpf_attr``, ``link_create`` with ``kprobe_multi``."""

    _fields_ = (
        ("prog_fd", ctypes.c_uint32),
        ("target_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("kprobe_multi_flags", ctypes.c_uint32),
        ("cnt", ctypes.c_uint32),
        ("syms", ctypes.c_uint64),
        ("addrs", ctypes.c_uint64),
        ("cookies", ctypes.c_uint64),
    )


class _Info(ctypes.Structure):
    """``union bpf_attr``, ``info``."""

    _fields_ = (("bpf_fd", ctypes.c_uint32), ("info_len", ctypes.c_uint32), ("info", ctypes.c_uint64))


class _LinkInfo(ctypes.Structure):
    """``struct bpf_link_info`` with ``kprobe_multi``."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("addrs", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("missed", ctypes.c_uint64),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attr: ctypes.Structure) -> int:
    number = _NR_BPF[platform.machine()]
    done: int = _libc.syscall(number, command, ctypes.byref(attr), ctypes.sizeof(attr))
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done


class KprobeMulti:
    """One probe at the entries, or the returns, of many functions (``kernel/trace/bpf_trace.c``,
    bpf_kprobe_multi_link_attach())."""

    def __init__(self, program: int, cookies: Mapping[int, int], returns: bool = False) -> None:
        """Attach.

        :param program: descriptor of a program loaded for ``BPF_TRACE_KPROBE_MULTI``
        :param cookies: what bpf_get_attach_cookie() gives, by the function's address
        :raises OSError: if the kernel refuses, be it one function only
        """
        addresses = (ctypes.c_uint64 * len(cookies))(*cookies)
        values = (ctypes.c_uint64 * len(cookies))(*cookies.values())
        self._fd = _bpf(
            BPF_LINK_CREATE,
            _LinkCreate(
                prog_fd=program,
                attach_type=BPF_TRACE_KPROBE_MULTI,
                kprobe_multi_flags=BPF_F_KPROBE_MULTI_RETURN if returns else 0,
                cnt=len(cookies),
                addrs=ctypes.addressof(addresses),
                cookies=ctypes.addressof(values),
            ),
        )

    def missed(self) -> int:
        """Return how many calls the kernel could not hand on. Linux before 6.7 does not tell: 0."""
        info = _LinkInfo()
        _bpf(
            BPF_OBJ_GET_INFO_BY_FD,
            _Info(bpf_fd=self._fd, info_len=ctypes.sizeof(info), info=ctypes.addressof(info)),
        )
        return int(info.missed)

    def close(self) -> int:
        """Detach, and return what was missed."""
        try:
            return self.missed()
        finally:
            os.close(self._fd)
