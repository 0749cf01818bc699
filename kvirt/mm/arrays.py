# SPDX-License-Identifier: GPL-2.0-only
"""What arrays of many pages have in common: mostly, the same in all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

Scalar = TypeVar("Scalar", bound=np.generic)


def constant(value: Scalar, length: int) -> npt.NDArray[Scalar]:
    """An array with the same value everywhere: of numbers in the room of one, and not to be written to."""
    if isinstance(value, np.bool_):
        # numpy goes through neighbouring bytes many times as fast.
        return np.full(length, value)
    # As np.broadcast_to() does it, which takes twenty times as long.
    return np.ndarray((length,), value.dtype, value, strides=(0,))


def is_constant(array: npt.NDArray[Scalar]) -> bool:
    """Whether an array is known to be of one number, made by :func:`constant`."""
    return array.strides == (0,) and len(array) > 0


def compact(array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """An array's values, as a constant if they are all the same, else side by side."""
    if is_constant(array):
        return array
    if len(array) and array[0] == array[-1] and array[0] == array[len(array) // 2]:
        first = array[0]
        if (array == first).all():
            return constant(first, len(array))
    return np.ascontiguousarray(array)


class Column(Generic[Scalar]):
    """An array that is filled from its beginning, and is a constant as long as all of it is the same."""

    def __init__(
        self, dtype: np.dtype[Scalar], length: int, mask: int = -1, unless: int | None = None
    ) -> None:
        """Prepare.

        :param mask: the bits that must be the same in all of it for a constant, which has these alone
        :param unless: if given, bits that matter: as long as none of the values has one, all of it is 0
        """
        self._dtype, self._length, self._mask, self._unless = dtype, length, mask, unless
        self._filled = 0
        self._value: Any = None
        self._array: npt.NDArray[Scalar] | None = None

    def put(self, values: npt.NDArray[Scalar], every: int, some: int) -> None:
        """Set the next part of it.

        :param every: the bits that all of *values* have
        :param some: those that one of them has
        """
        part = slice(self._filled, self._filled + len(values))
        self._filled = part.stop
        if self._array is None:
            every, some = every & self._mask, some & self._mask
            if self._unless is not None:
                every, some = 0, some & self._unless
            if every == some and self._value in (None, every):
                self._value = every
                return
            self._array = np.empty(self._length, dtype=self._dtype)
            self._array[: part.start] = self._value or 0
        self._array[part] = values

    def array(self) -> npt.NDArray[Scalar]:
        """All of it, once it is filled."""
        if self._array is not None:
            return self._array
        if self._value is None:
            return np.empty(0, dtype=self._dtype)
        return constant(self._dtype.type(self._value), self._length)


def any_bits(array: npt.NDArray[np.uint64]) -> int:
    """The bits that any of the numbers has."""
    return int(array[0] if is_constant(array) else np.bitwise_or.reduce(array))


def each(function: Callable[..., Any], *arrays: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """``function(*arrays)``, of arrays of one length; computed once where all of them are constants."""
    if all(map(is_constant, arrays)):
        return constant(function(*(array[0] for array in arrays)), len(arrays[0]))
    result: npt.NDArray[Any] = function(*arrays)
    return result


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


def runs(array: npt.NDArray[Scalar]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Where each run of the same value begins, and for each element the number of its run."""
    changes = np.empty(len(array), dtype=bool)
    changes[:1] = True
    np.not_equal(array[1:], array[:-1], out=changes[1:])
    return np.flatnonzero(changes), np.cumsum(changes) - 1
