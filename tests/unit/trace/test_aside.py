# SPDX-License-Identifier: GPL-2.0-only
import os
import signal

import pytest

from kvirt.errors import KvirtError
from kvirt.trace.aside import Aside


def refuse():
    raise KvirtError("This kernel has no BTF.")


def end():
    os.kill(os.getpid(), signal.SIGKILL)


def test_result_is_of_another_process():
    here, there = os.getpid(), Aside(os.getpid).result()
    assert there != here


def test_large_results_come_whole():
    assert Aside(lambda: list(range(300_000))).result() == list(range(300_000))


def test_errors_come_back():
    with pytest.raises(KvirtError, match=r"^This kernel has no BTF\.$"):
        Aside(refuse).result()


def test_what_is_ended_is_told():
    with pytest.raises(KvirtError, match="ended by somebody"):
        Aside(end).result()


def test_defects_come_back_too():
    with pytest.raises(ZeroDivisionError):
        Aside(lambda: 1 / 0).result()
