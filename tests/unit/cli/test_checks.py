# SPDX-License-Identifier: GPL-2.0-only
"""The list of invariants, and what is said of each: without a kernel, and without root."""

import json

import jsonschema
import pytest
from click.testing import CliRunner

from kvirt.checks.registry import every_check
from kvirt.cli import cli
from kvirt.errors import KvirtError
from kvirt.layout import Scheme
from kvirt.render import checks as render
from kvirt.render.json import schema
from tests.unit.fake import make_layout


def run(*arguments):
    return CliRunner().invoke(cli, ["checks", *arguments], catch_exceptions=True)


@pytest.mark.parametrize("columns", [80, 100])
def test_list_fits(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    done = run()
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines) <= columns
    listed = [line.split()[:2] for line in lines[2:] if line and line[0].isupper()]
    assert listed == [[check.id, str(check.severity)] for check in every_check()]
    at = lines[0].index("what must hold")
    # A path that is too long for the column goes on in the next line.
    told = "".join("".join(line[at:].split()) for line in lines)
    for check in every_check():
        assert "".join(f"{check.says} for {check.relied_on}".split()) in told


def test_one_is_explained(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = run("vma-unfaulted-pgoff", "FOLIO-INDEX")
    assert done.exit_code == 0
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    text = " ".join(done.stdout.split())
    assert text.startswith("VMA-UNFAULTED-PGOFF: error; kernels: two offsets (Linux 7.3 and later)")
    for check in every_check():
        if check.id in ("VMA-UNFAULTED-PGOFF", "FOLIO-INDEX"):
            assert check.explanation
            for sentence in (check.says, check.relied_on, *check.explanation):
                assert sentence in text


@pytest.mark.parametrize(("id_", "then"), [("FOLIO-INDX", "did you mean FOLIO-INDEX?"), ("ä", "lists them")])
def test_unknown_id(id_, then):
    error = run(id_).exception
    assert isinstance(error, KvirtError)
    assert then in str(error)
    assert id_ in str(error)


def test_document():
    document = json.loads(run("--format", "json").stdout)
    jsonschema.validate(document, schema("kvirt.checks/1"))
    assert [check["id"] for check in document["checks"]] == [check.id for check in every_check()]
    assert "kernel" not in document
    one = json.loads(run("AVC-SELF", "--format", "json").stdout)
    assert one["checks"] == [check for check in document["checks"] if check["id"] == "AVC-SELF"]


@pytest.mark.parametrize("scheme", [Scheme.ANON_PGOFF, Scheme.LEGACY])
def test_kernel_that_is_named(scheme):
    layout = make_layout(scheme)
    document = json.loads(render.checks_document(every_check(), layout))
    jsonschema.validate(document, schema("kvirt.checks/1"))
    applies = {check["id"]: check["applies"] for check in document["checks"]}
    assert applies["FOLIO-INDEX"]
    assert applies["VMA-PURE-ANON-PGOFF"] == (scheme is not Scheme.LEGACY)
    assert applies["LEG-UNFAULTED-PGOFF"] == (scheme is Scheme.LEGACY)
    marked = render.checks_table(every_check(), layout).count(render.NOT_HERE)
    assert marked == list(applies.values()).count(False) > 0
    for check in every_check():
        # As wide as the terminal may be.
        said = " ".join(render.explanation(check, layout).split())
        assert (render.NOT_HERE in said) is not applies[check.id]
