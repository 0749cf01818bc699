# SPDX-License-Identifier: GPL-2.0-only
"""The line that counts pages on a terminal."""

import sys

import pytest

from kvirt.cli import common


@pytest.fixture
def clock(monkeypatch):
    """Seconds that go by when they are added to."""
    now = [1000.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    return now


def test_what_is_done_at_once_leaves_the_terminal_alone(monkeypatch, capsys, clock):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with common.page_progress() as progress:
        for _ in range(10):
            clock[0] += 0.015
            progress(1000)
    assert capsys.readouterr().err == ""


def test_what_takes_longer_is_counted_a_few_times_a_second_and_wiped(monkeypatch, capsys, clock):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with common.page_progress() as progress:
        for _ in range(10):
            clock[0] += 0.125
            progress(1000)
    *lines, last = capsys.readouterr().err.split("\r\x1b[K")[1:]
    assert lines == [f"{number:,} pages, 8,000/s" for number in (2000, 4000, 6000, 8000, 10000)]
    assert last == ""


def test_no_terminal_no_line(capsys, clock):
    with common.page_progress() as progress:
        clock[0] += 1
        progress(1000)
    assert capsys.readouterr().err == ""
