# SPDX-License-Identifier: GPL-2.0-only
"""The manual says what the program does."""

import re
from pathlib import Path

import pytest

from kvirt.checks.registry import every_check
from kvirt.render.checks import kernels_of

TREE = Path(__file__).resolve().parents[2]


def section(check):
    parts = [
        f"## {check.id}",
        check.says,
        f"Severity: {check.severity}. Kernels: {kernels_of(check)}. Relied on by {check.relied_on}.",
        *check.explanation,
    ]
    return "\n\n".join(parts) + "\n\n"


def test_every_invariant_is_explained(request):
    """Between the introduction and what is not judged: the same as `kvirt checks ID` prints."""
    page = TREE / "docs" / "findings.md"
    text = page.read_text()
    head, tail = text[: text.index("## ")], text[text.index("## What is not judged") :]
    generated = head + "".join(section(check) for check in every_check()) + tail
    if request.config.getoption("--write-docs"):
        page.write_text(generated)
    assert page.read_text() == generated, (
        "docs/findings.md is not what the checks say of themselves: put what more is to be said into the "
        "docstring of the check, below its first line, and run with --write-docs"
    )


@pytest.mark.parametrize(
    "page", [TREE / "README.md", *sorted((TREE / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
