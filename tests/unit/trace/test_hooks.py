# SPDX-License-Identifier: GPL-2.0-only
"""What is attached to what, and in which order: a made-up bcc takes it down. Real ones are in tests/live."""

import itertools
import os
from types import SimpleNamespace

import pytest

from kvirt.errors import KvirtError
from kvirt.trace import hooks
from kvirt.trace.hooks import Hooks, Probe

STEP = Probe("try_to_unmap_one", "rmap_one")
WALK = Probe("rmap_walk_anon", "enter_walk", "leave_walk")
BIRTH = Probe("folio_add_new_anon_rmap", "enter_birth", "leave_birth")
PROBES = (STEP, WALK, BIRTH)
ADDRESSES = {probe.function: 0x1000 + i for i, probe in enumerate(PROBES)}


class Bpf:
    """As far as Hooks knows bcc.BPF."""

    KPROBE = 2

    def __init__(self, log, refuses=()):
        self.log, self.refuses = log, refuses
        self.funcs = {}
        self.programs = {}

    def __getitem__(self, name):
        assert name == "programs"
        return self

    def __setitem__(self, index, fd):
        self.programs[index.value] = fd.value

    def load_func(self, name, kind, attach_type=-1):
        assert kind == self.KPROBE
        if name.encode() not in self.funcs:
            function = SimpleNamespace(fd=os.memfd_create(name), name=name, type=attach_type)
            self.funcs[name.encode()] = function
        return self.funcs[name.encode()]

    def _single(self, kind, event, fn_name):
        # The kernel refuses programs that are meant for many.
        assert self.funcs[fn_name.encode()].type == -1
        if (kind, event) in self.refuses:
            raise OSError("no such thing")
        self.log.append((kind, event, fn_name))

    def attach_kprobe(self, event, fn_name):
        self._single("entry", event, fn_name)

    def attach_kretprobe(self, event, fn_name):
        self._single("return", event, fn_name)

    def detach_kprobe(self, event, fn_name):
        self.log.append(("no entry", event, fn_name))

    def detach_kretprobe(self, event, fn_name):
        self.log.append(("no return", event, fn_name))


@pytest.fixture
def machine(monkeypatch):
    """Make a machine's bcc and its hooks, and the list of what was done."""

    def make(fprobe, fprobe_returns, refuses=(), refused_links=(), processors=1):
        """
        :param refused_links: which probes of many functions the kernel refuses, by their number
        """
        log = []
        bpf = Bpf(log, refuses)
        tried = itertools.count()
        monkeypatch.setattr(hooks.time, "sleep", lambda seconds: log.append("wait"))
        monkeypatch.setattr(hooks.os, "sysconf", lambda name: processors)

        class Link:
            def __init__(self, program, cookies, returns):
                if next(tried) in refused_links:
                    raise OSError("Operation not supported")
                assert program == bpf.funcs[b"dispatch"].fd
                assert 0 not in cookies.values()
                names = {function.fd: function.name for function in bpf.funcs.values()}
                self.called = {
                    function: names[bpf.programs[cookies[address]]]
                    for function, address in ADDRESSES.items()
                    if address in cookies
                }
                self.kind = "returns" if returns else "entries"
                log.append((self.kind, self.called))

            def missed(self):
                return 3

            def close(self):
                log.append((f"no {self.kind}", *self.called))
                return 4

        monkeypatch.setattr(hooks, "KprobeMulti", Link)
        return Hooks(bpf, Bpf, fprobe, fprobe_returns), log

    # Hooks asks the module bcc for BPF.KPROBE.
    monkeypatch.setattr(Bpf, "BPF", Bpf, raising=False)
    return make


RETURNS = ("returns", {"rmap_walk_anon": "leave_walk", "folio_add_new_anon_rmap": "leave_birth"})
STEPS = ("entries", {"try_to_unmap_one": "rmap_one"})
ENTRIES = ("entries", {"rmap_walk_anon": "enter_walk", "folio_add_new_anon_rmap": "enter_birth"})
SINGLE_RETURNS = [
    ("return", "rmap_walk_anon", "leave_walk"),
    ("return", "folio_add_new_anon_rmap", "leave_birth"),
]
SINGLE_STEPS = [("entry", "try_to_unmap_one", "rmap_one")]
SINGLE_ENTRIES = [
    ("entry", "rmap_walk_anon", "enter_walk"),
    ("entry", "folio_add_new_anon_rmap", "enter_birth"),
]


def undone(singles):
    return [(f"no {kind}", function, program) for kind, function, program in singles]


def test_walks_are_seen_whole(machine):
    one, log = machine(True, True)
    assert one.attach(PROBES, ADDRESSES) == {}
    assert log == [RETURNS, STEPS, ENTRIES]
    assert not one.single
    assert one.missed == 9
    del log[:]
    assert one.detach()
    assert log == [
        ("no entries", "rmap_walk_anon", "folio_add_new_anon_rmap"),
        "wait",
        ("no entries", "try_to_unmap_one"),
        ("no returns", "rmap_walk_anon", "folio_add_new_anon_rmap"),
    ]
    assert one.missed == 12
    assert not one.detach()


@pytest.mark.parametrize(("fprobe", "refused_links"), [(True, (0, 1, 2)), (False, ())])
def test_walks_are_seen_whole_by_single_probes_too(machine, fprobe, refused_links):
    one, log = machine(fprobe, fprobe, refused_links=refused_links)
    assert one.attach(PROBES, ADDRESSES) == {}
    assert log == SINGLE_RETURNS + SINGLE_STEPS + SINGLE_ENTRIES
    assert one.single
    del log[:]
    assert one.detach()
    assert log == [*undone(SINGLE_ENTRIES), "wait", *undone(SINGLE_STEPS), *undone(SINGLE_RETURNS)]
    assert one.missed == 0 and not one.single


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_some_together_and_some_alone(machine, refused):
    one, log = machine(True, True, refused_links=(refused,))
    assert one.attach(PROBES, ADDRESSES) == {}
    together = [[RETURNS], [STEPS], [ENTRIES]]
    together[refused] = [SINGLE_RETURNS, SINGLE_STEPS, SINGLE_ENTRIES][refused]
    assert log == [*itertools.chain(*together)]
    assert one.single
    del log[:]
    assert one.detach()
    # Entries are let go first, then one waits.
    assert log.index("wait") == (2 if refused == 2 else 1)


@pytest.mark.parametrize(("processors", "together"), [(2, False), (3, True)])
def test_where_room_for_returns_is_limited(machine, processors, together):
    """Two functions: two calls of each on each processor, in one pool; a kretprobe has ten."""
    one, log = machine(True, False, processors=processors)
    assert one.attach(PROBES, ADDRESSES) == {}
    assert log == ([RETURNS] if together else SINGLE_RETURNS) + [STEPS, ENTRIES]


def test_what_is_refused_is_named(machine):
    one, log = machine(False, False, refuses={("entry", "rmap_walk_anon")})
    assert one.attach(PROBES, ADDRESSES) == {
        "rmap_walk_anon": "the kernel refused the probe (no such thing)."
    }
    assert log == SINGLE_RETURNS + SINGLE_STEPS + SINGLE_ENTRIES[1:]


def test_nothing_keeps_the_others_from_being_detached(machine, monkeypatch):
    one, log = machine(True, True)
    one.attach(PROBES, ADDRESSES)
    close = hooks.KprobeMulti.close

    def fail(link):
        close(link)
        raise OSError("Input/output error")

    monkeypatch.setattr(hooks.KprobeMulti, "close", fail)
    del log[:]
    assert one.detach()
    assert len([what for what in log if what != "wait"]) == 3


def test_a_program_that_is_refused_is_an_error(machine, monkeypatch):
    one, _ = machine(True, True)
    monkeypatch.setattr(Bpf, "load_func", lambda *_, **__: (_ for _ in ()).throw(OSError("too complex")))
    with pytest.raises(KvirtError, match=r"The kernel refuses a program \(too complex\)"):
        one.attach(PROBES, ADDRESSES)
