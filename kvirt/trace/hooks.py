# SPDX-License-Identifier: GPL-2.0-only
"""Programs attached to functions of the kernel, and taken away again."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from kvirt.errors import KvirtError
from kvirt.trace.link import BPF_TRACE_KPROBE_MULTI, KprobeMulti

# Seconds that functions which were entered before the detaching get to return.
GRACE = 0.1


@dataclass(frozen=True)
class Probe:
    """A function of the kernel, and the programs at its entry and its return."""

    function: str
    enter: str
    leave: str | None = None
    brief: bool = False
    """Whether it never sleeps, so that no processor is in more than one call of it."""


@contextmanager
def complaints() -> Iterator[Callable[[], str]]:
    """Keep what C code writes on stderr, and give a function that returns its last lines."""
    with os.fdopen(os.memfd_create("kvirt"), "w+b") as file:

        def said() -> str:
            file.seek(0)
            return "\n".join(file.read().decode(errors="replace").strip().splitlines()[-12:])

        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turn what bcc raises into a sentence, with the last lines of what C code said."""
    with complaints() as said:
        try:
            yield
        except Exception as error:
            words = said()
            # Where securityfs is not mounted, nobody could ask before.
            if "cannot use helper bpf_probe_read_kernel" in words:
                raise KvirtError(
                    "The kernel does not let programs read its memory, being locked down: boot it without "
                    "lockdown=confidentiality to trace it."
                ) from error
            raise KvirtError(
                f"{what} ({error}): report this kernel's version and these lines.\n{words}"
            ) from error


class Hooks:
    """What is attached.

    Where the kernel can, one probe stands for many functions: it removes them together, where dozens of
    single ones take it seconds, in which a killed tracer's would still be there.
    """

    def __init__(self, bpf: Any, bcc: Any, fprobe: bool, fprobe_returns: bool) -> None:
        """Prepare.

        :param bpf: the compiled programs, a ``bcc.BPF``
        :param fprobe: whether one probe can be at the entries of many functions
        :param fprobe_returns: the same of their returns
        """
        self._bpf = bpf
        self._bcc = bcc
        self._fprobe = fprobe
        self._fprobe_returns = fprobe_returns
        self._links: dict[str, KprobeMulti] = {}
        self._missed = 0
        self._cookies: dict[str, int] = {}
        self._entries: list[Probe] = []
        self._returns: list[Probe] = []

    def attach(self, probes: Sequence[Probe], addresses: Mapping[str, int]) -> dict[str, str]:
        """Attach all that the kernel lets; return why it does not, by function.

        :param addresses: where the functions are
        :raises KvirtError: if the kernel refuses a program itself
        """
        refused: dict[str, str] = {}
        leaving = [probe for probe in probes if probe.leave is not None]
        # Returns first: whoever is seen to enter is seen to leave.
        many = [probe for probe in leaving if self._fprobe and (self._fprobe_returns or probe.brief)]
        if not self._attach_many("returns", many, addresses):
            many = []
        for probe in leaving:
            if probe not in many:
                self._attach_one(self._bpf.attach_kretprobe, probe, probe.leave or "", self._returns, refused)
        left = [probe for probe in probes if probe.function not in refused]
        entering = [probe for probe in left if probe.leave is None]
        # Then what is called on the way: a walk that is seen to begin is seen whole.
        for name, some in (("steps", entering), ("entries", [probe for probe in left if probe.leave])):
            if not (self._fprobe and self._attach_many(name, some, addresses)):
                for probe in some:
                    self._attach_one(self._bpf.attach_kprobe, probe, probe.enter, self._entries, refused)
        return refused

    @property
    def missed(self) -> int:
        """Calls that the kernel could not hand on to a program."""
        return self._missed + sum(link.missed() for link in self._links.values())

    def detach(self) -> bool:
        """Take away what is attached, if anything is. Calls that were seen to begin get the time to be seen
        to end."""
        if not (self._links or self._entries or self._returns):
            return False
        for name in ("entries", "steps"):
            self._close(name)
        for probe in self._entries:
            self._let_go(self._bpf.detach_kprobe, probe.function, probe.enter)
        if "returns" in self._links or self._returns:
            time.sleep(GRACE)
        self._close("returns")
        for probe in self._returns:
            self._let_go(self._bpf.detach_kretprobe, probe.function, probe.leave or "")
        self._entries.clear()
        self._returns.clear()
        return True

    def _close(self, name: str) -> None:
        link = self._links.pop(name, None)
        if link is not None:
            self._missed += link.close()

    def _attach_many(self, name: str, probes: Sequence[Probe], addresses: Mapping[str, int]) -> bool:
        """Attach one probe to all of them: to their returns if it has that name, else to their entries."""
        if not probes:
            return True
        returns = name == "returns"
        wanted = {addresses[p.function]: (p.leave or "") if returns else p.enter for p in probes}
        with refusals("The kernel refuses a program"):
            cookies = {address: self._cookie(program) for address, program in wanted.items()}
            dispatcher = self._load("dispatch")
        # One of the functions may be the reason: each for itself, which will tell.
        with suppress(OSError):
            self._links[name] = KprobeMulti(dispatcher.fd, cookies, returns)
            return True
        for program in set(wanted.values()):
            self._unload(program)
        return False

    def _cookie(self, program: str) -> int:
        """Have a program called for a cookie."""
        if program not in self._cookies:
            self._cookies[program] = len(self._cookies)
            index, fd = ctypes.c_int(self._cookies[program]), ctypes.c_int(self._load(program).fd)
            self._bpf["programs"][index] = fd
        return self._cookies[program]

    def _attach_one(
        self,
        attach: Callable[..., None],
        probe: Probe,
        program: str,
        attached: list[Probe],
        refused: dict[str, str],
    ) -> None:
        with refusals("The kernel refuses a program"):
            self._bpf.load_func(program, self._bcc.BPF.KPROBE)
        with complaints() as said:
            try:
                attach(event=probe.function, fn_name=program)
            except Exception as error:
                words = " ".join(said().split()) or str(error)
                refused[probe.function] = f"the kernel refused the probe ({words})."
                return
        attached.append(probe)

    def _load(self, program: str) -> Any:
        return self._bpf.load_func(program, self._bcc.BPF.KPROBE, attach_type=BPF_TRACE_KPROBE_MULTI)

    def _unload(self, program: str) -> None:
        # For probes of one function it has to be loaded in another way.
        function = self._bpf.funcs.pop(program.encode(), None)
        if function is not None:
            os.close(function.fd)

    @staticmethod
    def _let_go(detach: Callable[..., None], function: str, program: str) -> None:
        # Nothing may keep the others from being detached.
        with suppress(Exception):
            detach(function, program)
