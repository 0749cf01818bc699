# SPDX-License-Identifier: GPL-2.0-only
"""The program on a dump: exit status, documents, sentences."""

import json
import struct
import subprocess
import sys

import jsonschema
import pytest

from kvirt.render.json import schema
from tests.vmcore.conftest import TREE, kvirt


def sentence(done):
    """The one sentence of a refusal."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("kvirt: ")
    assert lines[0][-1] in ".!?"
    return lines[0]


def test_check_pid(dump):
    done = dump.kvirt("check-pid", dump.pid)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("CONSISTENT: ")
    assert dump.workload["kernel"] in lines[1]
    assert max(len(line) for line in lines) <= 100


def test_documents_keep_their_schemas(dump):
    done = dump.kvirt("check-pid", dump.pid, 1, "--format", "json")
    assert done.returncode == 0
    document = json.loads(done.stdout)
    jsonschema.validate(document, schema("kvirt.check/1"))
    assert [task["pid"] for task in document["tasks"]] == [dump.pid, 1]
    vmas = dump.kvirt("vmas", dump.pid, "--format", "json")
    assert vmas.returncode == 0
    listed = json.loads(vmas.stdout)
    jsonschema.validate(listed, schema("kvirt.vmas/1"))
    assert listed["vmas"] == document["tasks"][0]["vmas"]


def test_damage_from_the_command_line(dump):
    done = dump.kvirt("lab", "damage", "FOLIO-INDEX", dump.pid, "--format", "json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    jsonschema.validate(document, schema("kvirt.check/1"))
    errors = [f for f in document["findings"] if f["severity"] == "error"]
    assert [f["id"] for f in errors] == ["FOLIO-INDEX"]
    assert errors[0]["address"] in done.stderr
    address = errors[0]["address"]
    # The same again, by address, as a table.
    done = dump.kvirt("lab", "damage", "FOLIO-INDEX", dump.pid, "--at", address)
    assert done.returncode == 1
    assert done.stdout.startswith("INCONSISTENT: 1 error")
    assert f"FOLIO-INDEX at {address}:" in done.stdout


def test_a_warning_is_an_error_only_if_asked_for(dump):
    pid = dump.processes()["uffd-shared"]
    assert dump.kvirt("check-pid", pid, "--no-vmas").returncode == 0
    assert dump.kvirt("check-pid", pid, "--no-vmas", "--strict").returncode == 1


def test_who_cannot_be_checked(dump):
    assert "no process with PID 4194304" in sentence(dump.kvirt("check-pid", 4194304))
    assert "is a kernel thread" in sentence(dump.kvirt("check-pid", 2))
    assert "is a kernel thread" in sentence(dump.kvirt("vmas", 2))
    assert dump.kvirt("check-pid", 0).returncode == 2
    assert dump.kvirt("check-pid", "init").returncode == 2
    assert dump.kvirt("check-pid").returncode == 2


def test_truncated_core(dump, tmp_path):
    short = tmp_path / "vmcore"
    with dump.core.open("rb") as file:
        short.write_bytes(file.read(8 << 20))
    assert "is truncated" in sentence(kvirt("-c", short, "-s", dump.vmlinux, "check-pid", 1))


@pytest.mark.parametrize("megabytes", [1, 64, 1024, 2048])
def test_core_that_lacks_memory(dump, tmp_path, megabytes):
    """A core that says itself how little it has: what is missing is met somewhere on the way."""
    size = megabytes << 20
    with dump.core.open("rb") as file:
        data = bytearray(file.read(1 << 20))
        (phoff,) = struct.unpack_from("<Q", data, 32)
        entry_size, count = struct.unpack_from("<HH", data, 54)
        for at in range(phoff, phoff + count * entry_size, entry_size):
            (offset,) = struct.unpack_from("<Q", data, at + 8)
            (held,) = struct.unpack_from("<Q", data, at + 32)
            held = min(held, max(0, size - offset))
            struct.pack_into("<QQ", data, at + 32, held, held)
        short = tmp_path / "vmcore"
        with short.open("wb") as out:
            out.write(data)
            while out.tell() < size:
                piece = file.read(min(1 << 20, size - out.tell()))
                # Zeros as holes: most of the dump is empty.
                if piece != bytes(len(piece)):
                    out.write(piece)
                else:
                    out.seek(len(piece), 1)
            out.truncate(size)
    done = kvirt("-c", short, "-s", dump.vmlinux, "check-pid", dump.pid, "--no-vmas")
    assert done.returncode in (2, 3), (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert "unforeseen" not in done.stderr
    if done.returncode == 2:
        sentence(done)


def test_vmlinux_of_another_build(dump, request):
    other = "core_legacy" if "7.3" in dump.workload["kernel"] else "core73"
    vmlinux = request.getfixturevalue(other)[1]
    said = sentence(kvirt("-c", dump.core, "-s", vmlinux, "check-pid", 1))
    assert "does not belong to this kernel" in said
    assert dump.workload["kernel"] in said


@pytest.mark.parametrize(("name", "words"), [("missing", "does not exist"), ("text", "debug")])
def test_what_is_no_vmlinux(dump, tmp_path, name, words):
    path = tmp_path / name
    if name == "text":
        path.write_text("hello\n")
    assert words in sentence(kvirt("-c", dump.core, "-s", path, "check-pid", 1))


def test_core_without_debug_file(dump, tmp_path, monkeypatch):
    # Where this machine's kernel has its debug files by chance, the guest's are not.
    monkeypatch.delenv("DEBUGINFOD_URLS", raising=False)
    said = sentence(kvirt("-c", dump.core, "--types", "dwarf", "check-pid", 1))
    assert "No debug information was found" in said
    assert f"linux-image-{dump.workload['kernel']}-dbg" in said


def test_core_of_another_architecture(dump, tmp_path):
    """The dump's own notes, VMCOREINFO among them, under the header of an arm64 machine.

    That one is read too, and its VMCOREINFO would tell what its page tables look like.
    """
    with dump.core.open("rb") as file:
        header = bytearray(file.read(64))
        (phoff,) = struct.unpack_from("<Q", header, 32)
        entry_size, count = struct.unpack_from("<HH", header, 54)
        file.seek(phoff)
        entries = [file.read(entry_size) for _ in range(count)]
        note = bytearray(next(e for e in entries if struct.unpack_from("<I", e)[0] == 4))
        offset, size = struct.unpack_from("<Q", note, 8)[0], struct.unpack_from("<Q", note, 32)[0]
        file.seek(offset)
        notes = file.read(size)
    struct.pack_into("<H", header, 18, 183)
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HHHHH", header, 54, entry_size, 1, 0, 0, 0)
    struct.pack_into("<Q", note, 8, 64 + entry_size)
    path = tmp_path / "vmcore"
    path.write_bytes(bytes(header) + bytes(note) + notes)
    said = sentence(kvirt("-c", path, "check-pid", 1))
    assert "cannot be read far enough to find its kernel" in said
    assert "VMCOREINFO" in said


def test_plain_scripts(dump):
    done = dump.script("dump_vmas.py", dump.pid)
    assert done.returncode == 0, done.stderr
    listed = json.loads(dump.kvirt("vmas", dump.pid, "--format", "json").stdout)["vmas"]
    lines = done.stdout.splitlines()[1:]
    assert len(lines) == len(listed)
    for line, vma in zip(lines, listed, strict=True):
        start, end = line.split()[0].split("-")
        assert (int(start, 16), int(end, 16)) == (int(vma["start"], 16), int(vma["end"], 16))
        assert int(line.split()[3], 16) == int(vma["vm_pgoff"], 16)
        assert int(line.split()[4], 16) == int(vma["anon_pgoff"], 16)
    for name in ("dump_vmas.py", "check_anon_index.py"):
        for arguments in ((), ("x",), (4194304,), (2,)):
            done = dump.script(name, *arguments)
            assert done.returncode == 1
            assert "Traceback" not in done.stderr
            assert done.stderr.strip()


def test_what_takes_long_to_import_is_left_out(dump):
    # numpy.unique() and its kin bring it in where it is not expected.
    words = f"""
import sys
from kvirt.cli import cli
cli(["-c", {str(dump.core)!r}, "-s", {str(dump.vmlinux)!r}, "check-pid", "1"], standalone_mode=False)
print(sorted({{"numpy", "numpy.ma", "drgn.helpers.linux.bpf"}} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, cwd=TREE, check=False
    )
    assert (done.stdout.splitlines()[-1], done.stderr) == ("['numpy']", "")
