# SPDX-License-Identifier: GPL-2.0-only
"""What is attached to what, and in which order: a made-up bcc takes it down. Real ones are in tests/live."""

import os
from types import SimpleNamespace

import pytest

from kvirt.errors import KvirtError
from kvirt.trace import hooks
from kvirt.trace.hooks import Hooks, Probe

STEP = Probe("try_to_unmap_one", "rmap_one")
WALK = Probe("rmap_walk_anon", "enter_walk", "leave_walk")
BIRTH = Probe("folio_add_new_anon_rmap", "enter_birth", "leave_birth", brief=True)
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

    def make(fprobe, fprobe_returns, refuses=(), many=True):
        log = []
        bpf = Bpf(log, refuses)
        monkeypatch.setattr(hooks.time, "sleep", lambda seconds: log.append("wait"))

        class Link:
            def __init__(self, program, cookies, returns):
                if not many:
                    raise OSError("Operation not supported")
                assert program == bpf.funcs[b"dispatch"].fd
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
                log.append((f"no {self.kind}", list(self.called)))
                return 4

        monkeypatch.setattr(hooks, "KprobeMulti", Link)
        return Hooks(bpf, Bpf, fprobe, fprobe_returns), log

    # Hooks asks the module bcc for BPF.KPROBE.
    monkeypatch.setattr(Bpf, "BPF", Bpf, raising=False)
    return make


def test_returns_first_and_walks_last(machine):
    one, log = machine(True, True)
    assert one.attach(PROBES, ADDRESSES) == {}
    assert log == [
        ("returns", {"rmap_walk_anon": "leave_walk", "folio_add_new_anon_rmap": "leave_birth"}),
        ("entries", {"try_to_unmap_one": "rmap_one"}),
        ("entries", {"rmap_walk_anon": "enter_walk", "folio_add_new_anon_rmap": "enter_birth"}),
    ]
    assert one.missed == 9
    del log[:]
    assert one.detach()
    assert [what if isinstance(what, str) else what[0] for what in log] == [
        *("no entries", "no entries", "wait", "no returns"),
    ]
    assert one.missed == 12
    assert not one.detach()


def test_functions_that_sleep_return_by_probes_of_their_own(machine):
    one, log = machine(True, False)
    assert one.attach(PROBES, ADDRESSES) == {}
    assert log[:2] == [
        ("returns", {"folio_add_new_anon_rmap": "leave_birth"}),
        ("return", "rmap_walk_anon", "leave_walk"),
    ]
    assert [kind for kind, *_ in log[2:]] == ["entries", "entries"]


@pytest.mark.parametrize(("fprobe", "many"), [(True, False), (False, True)])
def test_one_by_one(machine, fprobe, many):
    one, log = machine(fprobe, fprobe, many=many, refuses={("entry", "rmap_walk_anon")})
    assert one.attach(PROBES, ADDRESSES) == {
        "rmap_walk_anon": "the kernel refused the probe (no such thing)."
    }
    assert log == [
        ("return", "rmap_walk_anon", "leave_walk"),
        ("return", "folio_add_new_anon_rmap", "leave_birth"),
        ("entry", "try_to_unmap_one", "rmap_one"),
        ("entry", "folio_add_new_anon_rmap", "enter_birth"),
    ]
    del log[:]
    assert one.detach()
    assert [(kind, name) for kind, name, _ in filter(lambda what: what != "wait", log)] == [
        ("no entry", "try_to_unmap_one"),
        ("no entry", "folio_add_new_anon_rmap"),
        ("no return", "rmap_walk_anon"),
        ("no return", "folio_add_new_anon_rmap"),
    ]
    assert one.missed == 0


def test_a_program_that_is_refused_is_an_error(machine, monkeypatch):
    one, _ = machine(True, True)
    monkeypatch.setattr(Bpf, "load_func", lambda *_, **__: (_ for _ in ()).throw(OSError("too complex")))
    with pytest.raises(KvirtError, match=r"The kernel refuses a program \(too complex\)"):
        one.attach(PROBES, ADDRESSES)
