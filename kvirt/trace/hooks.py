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


# kernel/kprobes.c, register_kretprobe(): calls of one function whose return can be waited for, at the least.
KRETPROBE_ROOM = 10
# kernel/trace/fprobe.c before Linux 6.14, fprobe_init_rethook(): in all functions together, for each of them
# and each processor.
FPROBE_ROOM = 2


class Hooks:
    """What is attached.

    Where the kernel can, one probe stands for many functions: it removes them together, where dozens of
    single ones take it seconds, in which a killed tracer's would still be there.
    """

    def __init__(self, bpf: Any, bcc: Any, fprobe: bool, fprobe_returns: bool) -> None:
        """Prepare.

        :param bpf: the compiled programs, a ``bcc.BPF``
        :param fprobe: whether one probe can be at many functions
        :param fprobe_returns: whether it can wait for any number of returns
        """
        self._bpf = bpf
        self._bcc = bcc
        self._fprobe = fprobe
        self._fprobe_returns = fprobe_returns
        self._links: dict[str, KprobeMulti] = {}
        self._missed = 0
        self._cookies: dict[str, int] = {}
        self._singles: dict[str, list[Probe]] = {"entries": [], "steps": [], "returns": []}

    def attach(self, probes: Sequence[Probe], addresses: Mapping[str, int]) -> dict[str, str]:
        """Attach all that the kernel lets; return why it does not, by function.

        :param addresses: where the functions are
        :raises KvirtError: if the kernel refuses a program itself
        """
        refused: dict[str, str] = {}
        leaving = [probe for probe in probes if probe.leave is not None]
        # Returns first: whoever is seen to enter is seen to leave.
        self._attach("returns", leaving, addresses, refused, self._has_room(len(leaving)))
        left = [probe for probe in probes if probe.function not in refused]
        # Then what is called on the way: a walk that is seen to begin is seen whole.
        self._attach("steps", [p for p in left if p.leave is None], addresses, refused, self._fprobe)
        self._attach("entries", [p for p in left if p.leave], addresses, refused, self._fprobe)
        return refused

    @property
    def single(self) -> bool:
        """Whether some functions have a probe of their own."""
        return any(self._singles.values())

    @property
    def missed(self) -> int:
        """Calls that the kernel could not hand on to a program, as far as it tells."""
        return self._missed + sum(link.missed() for link in self._links.values())

    def detach(self) -> bool:
        """Take away what is attached, if anything is, in the other order. Calls that were seen to begin get
        the time to be seen to end, with all that is on the way."""
        if not (self._links or self.single):
            return False
        self._detach("entries")
        if "returns" in self._links or self._singles["returns"]:
            time.sleep(GRACE)
        self._detach("steps")
        self._detach("returns")
        return True

    def _has_room(self, functions: int) -> bool:
        """Whether one probe of all waits for as many returns of any function as its own would."""
        room = FPROBE_ROOM * functions * os.sysconf("SC_NPROCESSORS_CONF")
        return self._fprobe and (self._fprobe_returns or room >= KRETPROBE_ROOM)

    def _attach(
        self,
        name: str,
        probes: Sequence[Probe],
        addresses: Mapping[str, int],
        refused: dict[str, str],
        together: bool,
    ) -> None:
        if not (together and self._attach_many(name, probes, addresses)):
            for probe in probes:
                self._attach_one(name, probe, refused)

    def _detach(self, name: str) -> None:
        # Nothing may keep the others from being detached.
        link = self._links.pop(name, None)
        if link is not None:
            with suppress(OSError):
                self._missed += link.close()
        detach = self._bpf.detach_kretprobe if name == "returns" else self._bpf.detach_kprobe
        for probe in self._singles[name]:
            with suppress(Exception):
                detach(probe.function, self._program(name, probe))
        self._singles[name].clear()

    @staticmethod
    def _program(name: str, probe: Probe) -> str:
        return (probe.leave or "") if name == "returns" else probe.enter

    def _attach_many(self, name: str, probes: Sequence[Probe], addresses: Mapping[str, int]) -> bool:
        """Attach one probe to all of them: to their returns if it has that name, else to their entries."""
        if not probes:
            return True
        wanted = {addresses[probe.function]: self._program(name, probe) for probe in probes}
        with refusals("The kernel refuses a program"):
            cookies = {address: self._cookie(program) for address, program in wanted.items()}
            dispatcher = self._load("dispatch")
        # One of the functions may be the reason: each for itself, which will tell.
        with suppress(OSError):
            self._links[name] = KprobeMulti(dispatcher.fd, cookies, name == "returns")
            return True
        for program in set(wanted.values()):
            self._unload(program)
        return False

    def _cookie(self, program: str) -> int:
        """Have a program called for a cookie; 0 is what the kernel gives where it has none."""
        if program not in self._cookies:
            self._cookies[program] = len(self._cookies) + 1
            index, fd = ctypes.c_int(self._cookies[program]), ctypes.c_int(self._load(program).fd)
            self._bpf["programs"][index] = fd
        return self._cookies[program]

    def _attach_one(self, name: str, probe: Probe, refused: dict[str, str]) -> None:
        program = self._program(name, probe)
        attach = self._bpf.attach_kretprobe if name == "returns" else self._bpf.attach_kprobe
        with refusals("The kernel refuses a program"):
            self._bpf.load_func(program, self._bcc.BPF.KPROBE)
        with complaints() as said:
            try:
                attach(event=probe.function, fn_name=program)
            except Exception as error:
                words = " ".join(said().split()) or str(error)
                refused[probe.function] = f"the kernel refused the probe ({words})."
                return
        self._singles[name].append(probe)

    def _load(self, program: str) -> Any:
        return self._bpf.load_func(program, self._bcc.BPF.KPROBE, attach_type=BPF_TRACE_KPROBE_MULTI)

    def _unload(self, program: str) -> None:
        # For probes of one function it has to be loaded in another way.
        function = self._bpf.funcs.pop(program.encode(), None)
        if function is not None:
            os.close(function.fd)
