# SPDX-License-Identifier: GPL-2.0-only
"""One tracing: the programs compiled, attached, read, and taken away again."""

from __future__ import annotations

import ctypes
import errno
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from kvirt.errors import KvirtError
from kvirt.layout_trace import TraceLayout
from kvirt.trace import counts, program
from kvirt.trace.compiler import compile_programs
from kvirt.trace.counts import (
    AssertionCounts,
    CopyVmaCounts,
    Counts,
    Displacer,
    ProcessCounts,
    RmapCounts,
    SplitVmaCounts,
    Tally,
    Violation,
)
from kvirt.trace.hooks import Hooks, Probe, refusals
from kvirt.trace.program import NEW_ANONS, RMAP_WALKS, Indexes, Request
from kvirt.trace.symbols import function_addresses

# What bcc itself includes of kernels from 6.19 uses what clang has to be told of.
DIALECT = ("-fms-extensions", "-Wno-microsoft-anon-tag")
# Headers that bcc includes and that nothing here uses, passed by as if they were included already: they
# take a third of the time. Where one has another guard, all works as well and is slower.
_GUARDS = (
    *("_LINUX_LOG2_H", "_ASM_X86_PAGE_H", "_UAPI__LINUX_IF_PACKET_H", "__LINUX_IF_PACKET_H"),
    *("_UAPI_LINUX_IF_ETHER_H",),
)
# bcc runs passes of its own over what the compiler makes: once is enough.
_PASSES = ("-Xclang", "-disable-llvm-passes")
# Nobody debugs the programs; what a debugger would need takes another tenth.
CFLAGS = (*DIALECT, *(f"-D{guard}" for guard in _GUARDS), *_PASSES, "-g0")
ATTACHED = "attached"
# Seconds between looks for names of places in programs.
NAMING = 0.3
FDINFO = Path("/proc/self/fdinfo")


def probes(request: Request, layout: TraceLayout) -> list[Probe]:
    """List what a request is to attach to."""
    wanted = []
    if request.rmap:
        # Callbacks first: a walk that is seen to begin is seen whole.
        wanted += [Probe(name, "rmap_one") for name in layout.callbacks]
        wanted += [
            Probe(name, f"enter_{name.lstrip('_')}", "leave_rmap_walk")
            for name in RMAP_WALKS
            if name in layout.arguments or name in layout.absent
        ]
        # Page table locks are held.
        wanted += [Probe(name, "enter_new_anon_rmap", "leave_new_anon_rmap") for name in NEW_ANONS]
    if request.copy_vma:
        wanted.append(Probe("copy_vma", "enter_copy_vma", "leave_copy_vma"))
    if request.split_vma:
        wanted.append(Probe("__split_vma", "enter_split_vma", "leave_split_vma"))
        wanted.append(Probe("vma_complete", "enter_vma_complete"))
    return wanted


# By file: the table of what its function has begun, and the words for what is left in it at the end.
CALLS = {
    "rmap_walk.c": ("walks", "walks of which the return was not seen"),
    "new_anon_rmap.c": ("new_anons", "new anonymous folios of which the index was not seen in the end"),
    "copy_vma.c": ("copies", "calls of copy_vma() of which the return was not seen in the end"),
    "split_vma.c": ("splits", "calls of __split_vma() of which the return was not seen in the end"),
}
# What an assertion is seen by.
ASSERTED_BY = {
    "COPY-AP": ("copy_vma",),
    "SPLIT-AP": ("vma_complete",),
    "NEW-INDEX": NEW_ANONS,
}


class _Violation(ctypes.Structure):
    """``struct violation`` of bpf/kvirt.h."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("expected", ctypes.c_uint64),
        ("actual", ctypes.c_uint64),
        ("stack", ctypes.c_uint64 * 32),
        ("assertion", ctypes.c_uint32),
        ("tgid", ctypes.c_uint32),
        ("tid", ctypes.c_uint32),
        ("comm", ctypes.c_char * 16),
        ("depth", ctypes.c_int32),
    )


class _Symbols:
    """Looks for functions while something else goes on."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._error: KvirtError | None = None
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        try:
            self._found = function_addresses(self._names)
        except KvirtError as error:
            self._error = error

    def addresses(self) -> dict[str, list[int]]:
        """Wait for what was found."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found


class Session:
    """Counts while its context is entered; nothing stays attached behind it.

    Should the process die without leaving the context, the kernel detaches everything: all is held by
    file descriptors.
    """

    def __init__(self, request: Request, layout: TraceLayout, bcc: ModuleType) -> None:
        """Prepare.

        :param bcc: the distribution's bcc, as :func:`kvirt.trace.environment.load_bcc` returns it
        """
        self.probes: dict[str, str] = {}
        self._request = request
        self._layout = layout
        self._bcc = bcc
        self._indexes = Indexes(len(layout.callbacks))
        if request.filtered and "owner" in layout.missing:
            raise KvirtError(layout.missing["owner"])
        if request.cgroup is not None and "cgroup" in layout.missing:
            raise KvirtError(layout.missing["cgroup"])
        self._files = program.files(request, layout)
        self._violations: list[Violation] = []
        self._told = 0
        self._named = 0.0
        self._unended: dict[str, int] = {}
        self._ended: float | None = None
        self._names: dict[tuple[int, int], str] = {}

    def __enter__(self) -> Session:
        text = program.text(self._request, self._layout)
        self._programs = set(re.findall(r"^int (\w+)\(", text, re.MULTILINE))
        defined = program.constants(self._request, self._layout)
        flags = [f"-D{name}={program.literal(value)}" for name, value in defined.items()]
        # The kernel takes its time to write down its symbols, and compiling leaves the interpreter free.
        wanted = probes(self._request, self._layout)
        symbols = _Symbols([probe.function for probe in wanted])
        with refusals("bcc cannot compile the program"):
            self._bpf: Any = compile_programs(self._bcc, text, [*CFLAGS, *flags])
        self._hooks = Hooks(self._bpf, self._bcc, self._layout.fprobe, self._layout.fprobe_returns)
        try:
            self._attach(wanted, symbols.addresses())
        except BaseException:
            self._detach()
            raise
        self._began = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._detach()

    @property
    def single(self) -> bool:
        """Whether some functions have a kprobe of their own."""
        return self._hooks.single

    def follow(self, pid: int) -> None:
        """Count a process, and from now on its descendants too (``Request.family``)."""
        self._bpf["family"][ctypes.c_uint32(pid)] = ctypes.c_uint8(1)

    def poll(self, seconds: float) -> list[Violation]:
        """Wait for violations up to that long, and return those that came."""
        self._bpf.ring_buffer_poll(int(seconds * 1000))
        # While the programs still run that know the names.
        if self._request.stacks and time.monotonic() > self._named + NAMING:
            self._displacers()
            self._named = time.monotonic()
        new = self._violations[self._told :]
        self._told = len(self._violations)
        return new

    def counts(self) -> Counts:
        """Return all that was counted since everything was attached."""
        # The details of violations that are counted below.
        self._bpf.ring_buffer_consume()
        cells = self._cells()

        def tally(indexes: Mapping[str, int]) -> dict[str, int]:
            return {name: cells[index] for name, index in indexes.items()}

        lost = tally(self._indexes.lost)
        untold = lost.pop("violations")
        unprobed = self._unprobed()
        return Counts(
            seconds=(self._ended or time.monotonic()) - self._began,
            probes=self.probes,
            rmap=self._rmap(tally, unprobed) if self._sees_rmap() else None,
            copy_vma=self._copy_vma(tally) if self._sees("copy_vma") else None,
            split_vma=self._split_vma(tally) if self._sees("__split_vma") else None,
            assertions=self._assertions(tally),
            lost={program.LOST[name]: n for name, n in lost.items() if n} | self._missed(unprobed),
            processes=self._processes(),
            displacers=self._displacers(),
            violations=tuple(self._violations),
            violations_untold=untold,
        )

    def _sees_rmap(self) -> bool:
        return all(any(map(self._sees, names)) for names in (RMAP_WALKS, self._layout.callbacks))

    def _sees(self, function: str) -> bool:
        return self.probes.get(function) == ATTACHED

    def _attach(self, wanted: list[Probe], addresses: Mapping[str, list[int]]) -> None:
        callbacks = self._bpf["callbacks"] if "rmap_walk.c" in self._files else {}
        for i, name in enumerate(self._layout.callbacks):
            for address in addresses.get(name, []):
                callbacks[ctypes.c_uint64(address)] = ctypes.c_uint32(i)
        absent: dict[str, str] = {}
        found_at: dict[str, int] = {}
        for probe in wanted:
            why = self._layout.absent.get(probe.function)
            found = addresses.get(probe.function, [])
            if why is None and len(found) != 1:
                why = (
                    "the kernel has several functions of this name, and a probe cannot tell them apart."
                    if found
                    else "this kernel has no such symbol: it was built without it, or it was inlined."
                )
            if why is None and probe.enter not in self._programs:
                why = "the functions that it belongs to cannot be probed here."
            if why is None:
                found_at[probe.function] = found[0]
            else:
                absent[probe.function] = why
        possible = [probe for probe in wanted if probe.function in found_at]
        absent |= self._hooks.attach(possible, found_at)
        for name in absent:
            # Walks that call it are to be told from those that come to no VMA.
            for address in addresses.get(name, []) if name in self._layout.callbacks else ():
                del callbacks[ctypes.c_uint64(address)]
        if all(probe.function in absent for probe in wanted):
            reasons = "; ".join(f"{name}: {why}" for name, why in absent.items())
            raise KvirtError(f"None of the functions to trace could be probed. {reasons}")
        if self._request.rmap and "callbacks" in self._layout.missing:
            absent["rmap_one"] = self._layout.missing["callbacks"]
        self.probes = {probe.function: ATTACHED for probe in wanted}
        self.probes |= {name: f"absent: {why}" for name, why in absent.items()}
        if self._request.comm is not None:
            for byte, mask in enumerate(self._request.comm.masks):
                self._bpf["glob"][ctypes.c_int(byte)] = ctypes.c_uint64(mask)
        self._bpf["violations"].open_ring_buffer(self._violated)
        if self._request.family:
            with refusals("The kernel refuses to tell of processes"):
                self._bpf.attach_raw_tracepoint("sched_process_fork", "follow_fork")
                self._bpf.attach_raw_tracepoint("sched_process_free", "forget_process")

    def stop(self) -> None:
        """Detach the probes. What was counted stays to be read, and what has begun and not ended is known."""
        self._ended = self._ended or time.monotonic()
        if self._hooks.detach():
            self._unended = {what: len(self._bpf[table]) for table, what in self._calls().items()}

    def _calls(self) -> dict[str, str]:
        """Tables of what has begun and not ended, and the words for it."""
        return {table: what for file, (table, what) in CALLS.items() if file in self._files}

    def _detach(self) -> None:
        self.stop()
        self._bpf.cleanup()

    def _cells(self) -> list[int]:
        # One structure for each processor.
        rows = [tuple(one.n) for one in self._bpf["counts"][ctypes.c_int(0)]]
        return [sum(column) for column in zip(*rows, strict=True)]

    def _rmap(
        self, tally: Callable[[Mapping[str, int]], dict[str, int]], unprobed: Mapping[str, int]
    ) -> RmapCounts:
        indexes = self._indexes
        told = {name for function, names in RMAP_WALKS.items() if self._sees(function) for name in names}
        if self._request.filtered:
            told.discard("empty")
        walks = {name: n if name in told else None for name, n in tally(indexes.walks).items()}
        callbacks: dict[str, Tally | None] = {}
        steps = dict.fromkeys(counts.STEPS, 0)
        for name, cells in zip(self._layout.callbacks, indexes.steps, strict=True):
            callbacks[name] = tally(cells) if self._sees(name) else None
            for step, n in (callbacks[name] or {}).items():
                steps[step] += n
        callbacks |= dict.fromkeys(unprobed)
        return RmapCounts(
            walks=walks,
            steps=steps,
            reasons=tally(indexes.reasons),
            labels=tally(indexes.labels),
            callbacks=callbacks,
            vmas={name: n for name, n in tally(indexes.vmas).items() if n},
        )

    def _unprobed(self) -> dict[str, int]:
        """Return walks that called what has no probe, by the name of that function."""
        if "rmap_walk.c" not in self._files:
            return {}
        found = self._bpf["unprobed"].items()
        return {self._kernel_name(address.value, offset=False): n.value for address, n in found}

    def _copy_vma(self, tally: Callable[[Mapping[str, int]], dict[str, int]]) -> CopyVmaCounts:
        indexes = self._indexes
        return CopyVmaCounts(
            tally(indexes.copy_vma), tally(indexes.copy_vma_reasons), tally(indexes.copy_vma_results)
        )

    def _split_vma(self, tally: Callable[[Mapping[str, int]], dict[str, int]]) -> SplitVmaCounts:
        errors = {}
        for number, n in self._bpf["split_errors"].items():
            errors[errno.errorcode.get(-number.value, str(number.value))] = n.value
        return SplitVmaCounts(tally(self._indexes.split_vma), errors)

    def _assertions(
        self, tally: Callable[[Mapping[str, int]], dict[str, int]]
    ) -> dict[str, AssertionCounts | None]:
        ok, bad = tally(self._indexes.ok), tally(self._indexes.bad)
        asserted_by = {**ASSERTED_BY, "RMAP-ADDRESS": self._layout.callbacks}
        return {
            name: AssertionCounts(ok[name], bad[name]) if any(map(self._sees, asserted_by[name])) else None
            for name in counts.ASSERTIONS
        }

    def _processes(self) -> tuple[ProcessCounts, ...]:
        found = []
        for pid, one in self._bpf["processes"].items():
            n = dict(zip(program.PROCESS_COUNTERS, one.n, strict=True))

            def of(kind: str, n: dict[str, int] = n) -> Tally:
                return {step: n[f"{kind}_{step}"] for step in ("hit", "fallback")}

            comm = one.comm.decode(errors="replace")
            found.append(ProcessCounts(pid.value or None, comm, of("rmap"), of("copy"), of("split")))
        return tuple(sorted(found, key=lambda process: (-process.fallbacks, process.pid or 0)))

    def _displacers(self) -> tuple[Displacer, ...]:
        if not (self._request.stacks and self._sees("copy_vma")):
            return ()
        found = []
        for key, one in self._bpf["displacers"].items():
            user, kernel = self._frames(key.user), self._frames(key.kernel)
            found.append(
                Displacer(
                    key.tgid,
                    key.comm.decode(errors="replace"),
                    one.vmas,
                    one.fallbacks,
                    tuple(self._user_name(key.tgid, address) for address in user),
                    tuple(map(self._kernel_name, kernel)),
                )
            )
        return tuple(sorted(found, key=lambda one: (-one.rmap_fallbacks, -one.vmas)))

    def _frames(self, stack: int) -> list[int]:
        return list(self._bpf["stacks"].walk(stack)) if stack >= 0 else []

    def _kernel_name(self, address: int, offset: bool = True) -> str:
        name: str = self._bpf.ksym(address, show_offset=offset).decode(errors="replace")
        return name

    def _user_name(self, pid: int, address: int) -> str:
        """Name a place in a program; once, for a program that has ended has no names any more."""
        if (pid, address) not in self._names:
            name = self._bpf.sym(address, pid, show_module=True, show_offset=True).decode(errors="replace")
            self._names[pid, address] = f"{address:#x}" if "[unknown]" in name else name
        return self._names[pid, address]

    def _violated(self, ctx: object, data: int, size: int) -> None:
        told = ctypes.cast(data, ctypes.POINTER(_Violation)).contents
        self._violations.append(
            Violation(
                counts.ASSERTIONS[told.assertion],
                told.tgid or None,
                told.tid,
                told.comm.decode(errors="replace"),
                told.start,
                told.end,
                told.address,
                told.expected,
                told.actual,
                tuple(self._kernel_name(address) for address in told.stack[: told.depth]),
            )
        )

    def _missed(self, unprobed: Mapping[str, int]) -> dict[str, int]:
        """Return what the programs were not even called for, and walks that called what has no probe."""
        lost = {f"walks that call {name}(), which has no probe": n for name, n in unprobed.items() if n}
        lost |= {what: n for what, n in self._unended.items() if n}
        missed = self._hooks.missed
        if missed:
            lost["calls that the kernel could not hand on to a program"] = missed
        missed = 0
        for function in self._bpf.funcs.values():
            for line in (FDINFO / str(function.fd)).read_text().splitlines():
                name, _, value = line.partition(":")
                if name == "recursion_misses":
                    missed += int(value)
        if missed:
            lost["events on a processor that another BPF program was just running on"] = missed
        return lost
