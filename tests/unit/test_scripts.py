# SPDX-License-Identifier: GPL-2.0-only
"""The demonstration, the benchmarks and the storm take minutes: whether their calls fit is seen before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
SCRIPTS = ("demo.py", "bench.py", "storm.py", "matrix.py", "arm64.py", "refusals.py")
# What is of no use without annotations.
DISABLED = ("var-annotated", "index", "assignment")


def complaints(*paths):
    """What mypy says of calls in scripts."""
    argv = [sys.executable, "-m", "mypy", "--config-file", os.devnull, "--check-untyped-defs"]
    argv += ["--ignore-missing-imports", *(f"--disable-error-code={code}" for code in DISABLED)]
    done = subprocess.run([*argv, *map(str, paths)], cwd=TREE, capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_calls_fit(name):
    assert "Success" in complaints(Path("scripts") / name)


def test_calls_that_do_not_fit_are_seen(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from kvirt.lab.progress import step\n\n\ndef f(report):\n    step(report, 'title')\n")
    assert 'Missing positional argument "label"' in complaints(wrong)
