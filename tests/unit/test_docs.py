# SPDX-License-Identifier: GPL-2.0-only
"""The manual says what the program does."""

import re
from pathlib import Path

import pytest

from kvirt.checks.registry import CHECKS, all_checks
from tests.unit.fake import make_layout

TREE = Path(__file__).resolve().parents[2]


def test_every_invariant_is_explained():
    all_checks(make_layout())
    text = (TREE / "docs" / "findings.md").read_text()
    for check in CHECKS.values():
        assert f"## {check.id}\n\n{check.says}\n\nSeverity: {check.severity}." in text


@pytest.mark.parametrize(
    "page", [TREE / "README.md", *sorted((TREE / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
