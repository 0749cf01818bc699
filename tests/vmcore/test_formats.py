# SPDX-License-Identifier: GPL-2.0-only
"""One guest at one moment in every format that dumps come in: the same is said of each."""

import json

import drgn
import pytest

from kvirt.elfcore import PT_LOAD, read_elf_core
from kvirt.kdump import read_kdump
from tests.vmcore import kdump
from tests.vmcore.conftest import kvirt

MAKEDUMPFILE = {"lzo": ("-l", "-d", "1"), "zstd": ("-z", "-d", "1"), "elf-gaps": ("-E", "-d", "1")}


@pytest.fixture(scope="module")
def plain(core73_dump, tmp_path_factory):
    """The ELF core as makedumpfile can read it."""
    path = tmp_path_factory.mktemp("formats") / "elf"
    kdump.for_makedumpfile(core73_dump.core, path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def said(core73_dump):
    return document(core73_dump, core73_dump.core)


def document(dump, core):
    """What check-pid says of the workload and of PID 1, but for the name of the file."""
    done = kvirt("-c", core, "-s", dump.vmlinux, "check-pid", dump.pid, 1, "--format", "json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["target"].pop("location") == str(core)
    assert document["totals"]["pages"]["verified"] > 5000
    return document


@pytest.fixture(params=["flattened", "reassembled", "snappy", *MAKEDUMPFILE])
def core(request, core73_dump, kdump73, tmp_path):
    """A dump of a format. They are large: none stays."""
    name = request.param
    path = tmp_path / name
    if name == "flattened":
        path.symlink_to(kdump73)
    elif name in MAKEDUMPFILE:
        kdump.makedumpfile(*MAKEDUMPFILE[name], request.getfixturevalue("plain"), path)
    else:
        kdump.reassemble(kdump73, path)
        if name == "snappy":
            reassembled = path.rename(tmp_path / "reassembled")
            assert kdump.to_snappy(reassembled, path) > 1000
            reassembled.unlink()
    yield path
    path.unlink()


def test_the_kernel_tells_its_architecture(core):
    headers = read_kdump(core)
    if core.name == "elf-gaps":
        assert headers is None
    else:
        assert headers.architecture is drgn.Architecture.X86_64
        assert headers.level == 1


def test_the_same_is_said_of_every_format(core73_dump, core, said):
    if core.name == "elf-gaps":
        loads = [header for header in read_elf_core(core).headers if header.type == PT_LOAD]
        assert any(load.memory > load.size for load in loads)
    assert document(core73_dump, core) == said
