# SPDX-License-Identifier: GPL-2.0-only
"""What arrays of many pages have in common: mostly, the same in all of them."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Scalar = TypeVar("Scalar", bound=np.generic)


def constant(value: Scalar, length: int) -> npt.NDArray[Scalar]:
    """An array with the same value everywhere, in the room of one; it cannot be written to."""
    return np.broadcast_to(value, (length,))


def is_constant(array: npt.NDArray[Scalar]) -> bool:
    """Whether an array is made by :func:`constant`."""
    return array.strides == (0,) and len(array) > 0


def pick(values: npt.NDArray[Scalar], rows: npt.NDArray[np.intp]) -> npt.NDArray[Scalar]:
    """``values[rows]``; constant rows give a constant."""
    if is_constant(rows):
        return constant(values[rows[0]], len(rows))
    return values[rows]


def take(array: npt.NDArray[Scalar], mask: npt.NDArray[np.bool_]) -> npt.NDArray[Scalar]:
    """``array[mask]``; of a constant that is one, and all of an array is the array."""
    if mask.all():
        return array
    if is_constant(array):
        return constant(array[0], int(np.count_nonzero(mask)))
    return array[mask]


def differs(array: npt.NDArray[Scalar], value: Scalar) -> npt.NDArray[np.bool_]:
    """``array != value``."""
    if is_constant(array):
        return constant(np.bool_(array[0] != value), len(array))
    result: npt.NDArray[np.bool_] = array != value
    return result


def runs(array: npt.NDArray[Scalar]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Where each run of the same value begins, and for each element the number of its run."""
    changes = np.empty(len(array), dtype=bool)
    changes[:1] = True
    np.not_equal(array[1:], array[:-1], out=changes[1:])
    return np.flatnonzero(changes), np.cumsum(changes) - 1
