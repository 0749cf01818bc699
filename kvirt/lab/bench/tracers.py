# SPDX-License-Identifier: GPL-2.0-only
"""Ways of tracing the same functions, to be compared: kvirt's, probes that do nothing, and bpftrace's.

Run inside a guest, as root: ``python3 -m kvirt.lab.bench.tracers TRACER KIND``. It says "ready" when all is
attached, and detaches when its stdin ends.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kvirt.btf import kernel_btf
from kvirt.layout_trace import read_trace_layout
from kvirt.trace.environment import load_bcc
from kvirt.trace.program import Request
from kvirt.trace.session import Session, probes

REQUESTS = {
    "copy-vma": Request(rmap=False, split_vma=False),
    "split-vma": Request(rmap=False, copy_vma=False),
    "rmap": Request(copy_vma=False, split_vma=False),
    "fault": Request(copy_vma=False, split_vma=False),
}

# The same counting as kvirt's: hits, fallbacks, what each was, and the assertion.
_ANON_PGOFF = "(((uint64)$v->__vm_anon_pgoff_hi << 32) | $v->__vm_anon_pgoff_lo)"
_HIT = f"{_ANON_PGOFF} == $v->vm_start >> 12"
BPFTRACE = {
    "copy-vma": f"""
kprobe:copy_vma {{
    $v = *(struct vm_area_struct **)arg0;
    @expected[tid] = (uint64)arg4;
    @kind[tid] = 3;
    if ((uint64)$v->anon_vma == 0) {{
        @expected[tid] = (uint64)arg1 >> 12;
        @kind[tid] = 1;
    }} else if ((uint64)arg4 == (uint64)arg1 >> 12) {{
        @kind[tid] = 2;
    }} else if ((uint64)$v->anon_vma->root != (uint64)$v->anon_vma || $v->anon_vma->num_children > 1) {{
        @kind[tid] = 4;
    }}
}}
kretprobe:copy_vma /@kind[tid]/ {{
    $v = (struct vm_area_struct *)retval;
    @calls[{_HIT}, @kind[tid]] = count();
    @process[pid, {_HIT}] = count();
    @ok[{_ANON_PGOFF} == @expected[tid]] = count();
    delete(@kind[tid]); delete(@expected[tid]);
}}""",
    "split-vma": f"""
kprobe:__split_vma {{
    $v = (struct vm_area_struct *)arg1;
    @place[tid] = {_HIT} ? 1 : 2;
}}
kretprobe:__split_vma /@place[tid]/ {{
    @calls[@place[tid], retval] = count();
    @process[pid, @place[tid]] = count();
    delete(@place[tid]);
}}
kprobe:vma_complete {{
    $p = (struct vma_prepare *)arg0;
    if ((uint64)$p->insert != 0) {{
        $v = $p->vma;
        $low = {_ANON_PGOFF} + (($p->insert->vm_start - $v->vm_start) >> 12);
        $v = $p->insert;
        @ok[$low == {_ANON_PGOFF}] = count();
    }}
}}""",
    "rmap": f"""
kprobe:rmap_walk,kprobe:rmap_walk_locked {{
    @class[tid] = ((uint64)((struct folio *)arg0)->mapping & 3) + 1;
}}
kprobe:folio_referenced_one,kprobe:try_to_unmap_one,kprobe:try_to_migrate_one,kprobe:remove_migration_pte,
kprobe:page_mkclean_one,kprobe:damon_folio_mkold_one,kprobe:damon_folio_young_one /@class[tid] == 2/ {{
    $v = (struct vm_area_struct *)arg1;
    $f = (struct folio *)arg0;
    @steps[func, {_HIT}] = count();
    @process[$v->vm_mm->owner->tgid, {_HIT}] = count();
    @seen[tid, {_HIT}] = 1;
    @ok[(uint64)arg2 == $v->vm_start + (($f->index - {_ANON_PGOFF}) << 12)] = count();
}}
kretprobe:rmap_walk,kretprobe:rmap_walk_locked /@class[tid]/ {{
    @walks[@class[tid], @seen[tid, 1], @seen[tid, 0]] = count();
    delete(@class[tid]); @seen[tid, 1] = 0; @seen[tid, 0] = 0;
}}""",
    "fault": f"""
kprobe:folio_add_new_anon_rmap,kprobe:hugetlb_add_new_anon_rmap {{
    $v = (struct vm_area_struct *)arg1;
    @folio[tid] = (uint64)arg0;
    @expected[tid] = {_ANON_PGOFF} + (((uint64)arg2 - $v->vm_start) >> 12);
}}
kretprobe:folio_add_new_anon_rmap,kretprobe:hugetlb_add_new_anon_rmap /@folio[tid]/ {{
    @ok[((struct folio *)@folio[tid])->index == @expected[tid]] = count();
    delete(@folio[tid]); delete(@expected[tid]);
}}""",
}


@contextmanager
def kvirt(kind: str) -> Iterator[None]:
    """Attach what ``kvirt trace`` attaches."""
    with Session(REQUESTS[kind], read_trace_layout(kernel_btf()), load_bcc()):
        yield


@contextmanager
def empty(kind: str) -> Iterator[None]:
    """Attach a program that does nothing to the same functions."""
    bpf = load_bcc().BPF(text="int nothing(void *ctx) { return 0; }")
    for probe in probes(REQUESTS[kind], read_trace_layout(kernel_btf())):
        if probe.leave is not None:
            bpf.attach_kretprobe(event=probe.function, fn_name="nothing")
        bpf.attach_kprobe(event=probe.function, fn_name="nothing")
    yield
    bpf.cleanup()


@contextmanager
def bpftrace(kind: str) -> Iterator[None]:
    """Run bpftrace with a script that counts the same."""
    script = 'BEGIN { printf("ready\\n"); }' + BPFTRACE[kind]
    child = subprocess.Popen(
        ["bpftrace", "-q", "-e", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stderr is not None
    try:
        while (line := child.stdout.readline()) != "ready\n":
            if not line:
                raise SystemExit(f"bpftrace did not start: {child.stderr.read()}")
        yield
    finally:
        child.terminate()
        out, _ = child.communicate()
        print(out.strip(), file=sys.stderr)


@contextmanager
def bare(kind: str) -> Iterator[None]:
    """Attach nothing."""
    yield


TRACERS = {"bare": bare, "empty": empty, "kvirt": kvirt, "bpftrace": bpftrace}


def main() -> None:
    """Attach, and wait for the end of stdin."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tracer", choices=sorted(TRACERS))
    parser.add_argument("kind", choices=sorted(REQUESTS))
    options = parser.parse_args()
    with TRACERS[options.tracer](options.kind):
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
