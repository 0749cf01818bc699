# SPDX-License-Identifier: GPL-2.0-only
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "argv", [["-m", "kvirt", "--version"], ["-c", "from kvirt.__main__ import main; main()"]]
)
def test_interrupted_while_importing(tmp_path, argv):
    (tmp_path / "click.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *argv], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 130
    assert (done.stdout, done.stderr) == (
        "",
        "kvirt: interrupted, and nothing is known of what was not printed.\n",
    )
