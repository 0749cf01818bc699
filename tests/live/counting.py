# SPDX-License-Identifier: GPL-2.0-only
"""Runs in a guest: has remaps.py do its phases, and counts what each was without BPF."""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from kprobes import Kprobes

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


def main():
    program = [sys.executable, str(Path(__file__).parent / "remaps.py"), *sys.argv[1:]]
    with Kprobes(COMM, FUNCTIONS) as kprobes:
        child = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for line in child.stdout:
            told = json.loads(line)
            if told.get("ready"):
                before = flat(kprobes.read())
                low, high = told["carve_out"]
            elif "counts" in told:
                now = flat(kprobes.read())
                seen = {}
                for (function, key), n in now.items():
                    n -= before.get((function, key), 0)
                    if n:
                        seen[function] = seen.get(function, 0) + n
                        if function == NEW_ANON and low <= key < high:
                            seen[IN_CARVE_OUT] = seen.get(IN_CARVE_OUT, 0) + n
                print(json.dumps({**told, "seen": seen}), flush=True)
            if "skipped" in told:
                print(line.decode(), end="", flush=True)
            else:
                os.write(child.stdin.fileno(), b"\n")
        status = child.wait()
        print(json.dumps({"missed": kprobes.missed(), "missing": sorted(kprobes.missing)}))
    sys.exit(status)


main()
