# SPDX-License-Identifier: GPL-2.0-only
"""Runs in a guest: has remaps.py do its phases, and counts each with kvirt's programs and without BPF."""

import json
import os
import subprocess
import sys
from pathlib import Path

from kvirt.btf import kernel_btf
from kvirt.layout_trace import read_trace_layout
from kvirt.render.trace_json import trace_document
from kvirt.trace.counts import since
from kvirt.trace.environment import load_bcc
from kvirt.trace.filters import Glob
from kvirt.trace.program import PROCESSES, Request
from kvirt.trace.session import Session
from tests.live.kprobes import Kprobes

COMM = "kvirt-remaps"
NEW_ANON = "folio_add_new_anon_rmap"
IN_CARVE_OUT = "folio_add_new_anon_rmap in the carve-out"
FUNCTIONS = {
    "copy_vma": None,
    "__split_vma": None,
    "vma_complete": None,
    # Not rmap_walk(): up to Linux 6.12 the compiler inlines it where mm/rmap.c itself calls it.
    "rmap_walk_anon": None,
    "rmap_walk_ksm": None,
    "rmap_walk_file": None,
    "__rmap_walk_file": None,
    "try_to_migrate_one": None,
    "remove_migration_pte": None,
    "try_to_unmap_one": None,
    "folio_referenced_one": None,
    # By the address: the interpreter faults in pages of its own meanwhile.
    NEW_ANON: "$arg3",
}


def flat(read):
    return {(function, key): n for function, keys in read.items() for key, n in keys.items()}


def seen_since(before, now, carve_out):
    seen = {}
    for (function, key), n in now.items():
        n -= before.get((function, key), 0)
        if n:
            seen[function] = seen.get(function, 0) + n
            if function == NEW_ANON and carve_out[0] <= key < carve_out[1]:
                seen[IN_CARVE_OUT] = seen.get(IN_CARVE_OUT, 0) + n
    return seen


def take(kprobes, session):
    """Read both of a moment when nothing happened."""
    while True:
        before, counts = flat(kprobes.read()), session.counts()
        if flat(kprobes.read()) == before:
            return before, counts


def main():
    remaps = Path(__file__).parent / "remaps.py"
    layout = read_trace_layout(kernel_btf())
    # The same name to both: kvirt's programs look at the owner of the memory, kprobes at who is running.
    session = Session(Request(comm=Glob.compile(COMM)), layout, load_bcc())
    with session, Kprobes(COMM, FUNCTIONS) as kprobes:
        child = subprocess.Popen(
            [sys.executable, str(remaps), *sys.argv[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for line in child.stdout:
            told = json.loads(line)
            if told.get("ready"):
                before = take(kprobes, session)
                carve_out = told["carve_out"]
            elif "counts" in told:
                now = take(kprobes, session)
                told["seen"] = seen_since(before[0], now[0], carve_out)
                document = trace_document(since(before[1], now[1]), top=PROCESSES, stacks=False)
                told["counted"] = json.loads(document)
                print(json.dumps(told), flush=True)
            if "skipped" in told:
                print(line.decode(), end="", flush=True)
            else:
                os.write(child.stdin.fileno(), b"\n")
        status = child.wait()
        print(json.dumps({"missed": kprobes.missed(), "missing": sorted(kprobes.missing)}))
    sys.exit(status)


main()
