"""Checks of arguments: the value as what it should be, or one sentence (InputError) with the value, the limit and the remedy.

Numbers of numpy and torch are numbers; True is not 1, and "6" is not 6.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sink_circuits.errors import InputError

MOST = 2**31 - 1
"""The largest whole number that is taken: no text has as many tokens."""


def shown(value) -> str:
    """A value as it stands in a sentence: on one line, and short."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and len(shape):  # arrays, tensors, tables
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever a foreign class does
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_number(value) -> bool:
    """A real number of Python, numpy or torch (of no axes), NaN and infinities included; neither a bool nor a text."""
    axes, dtype = getattr(value, "ndim", None), getattr(value, "dtype", None)
    if isinstance(value, bool | str | bytes) or axes or "bool" in str(dtype):
        return False
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return True


def is_whole(value) -> bool:
    """A whole number: an int, or numpy's or torch's integer of no axes; 6.0 is none."""
    if not is_number(value):
        return isinstance(value, int) and not isinstance(value, bool)  # too large for a float
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def whole(value, name: str, low: int = 0, high: int = MOST) -> int:
    """`value` as an int. Raises InputError unless it is a whole number in [low, high]."""
    if not is_whole(value):
        raise InputError(f"{name} = {shown(value)}: give a whole number.")
    number = operator.index(value)
    if number < low:
        raise InputError(f"{name} = {number}: at least {low}.")
    if number > high:
        raise InputError(f"{name} = {shown(number)}: at most {high}.")
    return number


def number(value, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a float. Raises InputError unless it is a finite number in [low, high]."""
    if not is_number(value) or not math.isfinite(float(value)):
        raise InputError(f"{name} = {shown(value)}: give a finite number.")
    if not low <= float(value) <= high:
        limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
        raise InputError(f"{name} = {shown(value)}: {limit}.")
    return float(value)


def share(value, name: str, *, whole: bool = False) -> float:
    """`value` as a float. Raises InputError unless it is a number above 0 and below 1 (`whole`: at most 1)."""
    if not is_number(value) or not (0 < float(value) < 1 or (whole and float(value) == 1)):
        limit = "above 0, at most 1" if whole else "between 0 and 1"
        raise InputError(f"{name} {shown(value)} is out of range: {limit}.")
    return float(value)


def numbers(values, name: str, axes: int | None = 1, *, infinite: bool = False) -> np.ndarray:
    """`values` as an array of floats with so many axes (None: any), NaN where something is undefined.

    Raises InputError for what holds anything but real numbers (a text, None, a truth value), for another number of axes, and for
    infinities unless `infinite`.
    """
    try:
        if hasattr(values, "detach"):  # a tensor
            values = values.detach().cpu()
            values = values.double() if values.is_floating_point() else values
        array = np.asarray(values)
        if array.dtype == object and not all(is_number(one) for one in array.flat):
            raise TypeError
        if array.dtype.kind not in "iufO" or isinstance(values, Mapping):
            raise TypeError
        array = array.astype(float)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{name} = {shown(values)}: give numbers, NaN for what is undefined.") from error
    if axes is not None and array.ndim != axes:
        raise InputError(
            f"{name} have {array.ndim} dimensions: give {'a list' if axes == 1 else f'{axes}'} of numbers."
        )
    if not infinite and np.isinf(array).any():
        raise InputError(f"some {name} are infinite: give finite ones, or NaN for what is undefined.")
    return array


def flag(value, name: str) -> bool:
    """`value` as a bool. Raises InputError for all else, however true it looks: "no" and 0 are not False."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} = {shown(value)}: give true or false.")
    return bool(value)


def text(value, name: str) -> str:
    """Raises InputError unless `value` is a string that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name} = {shown(value)}: give a string that is not empty.")
    return value


def one_of(value, name: str, known: Iterable[str], remedy: str = "use one of {}") -> str:
    """Raises InputError unless `value` is one of the `known` strings; `{}` in `remedy` stands for them."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name} {shown(value)} is unknown: {remedy.format(', '.join(known))}.")
    return value


def several(values, name: str, *, empty: bool = False) -> tuple:
    """`values` as a tuple. Raises InputError for one value, a text or a table, and for none of them unless `empty`."""
    try:
        if isinstance(values, str | bytes | Mapping) or getattr(values, "ndim", 1) != 1:
            raise TypeError
        made = tuple(values)
    except TypeError as error:
        raise InputError(f"{name} = {shown(values)}: give a list.") from error
    if not made and not empty:
        raise InputError(f"{name} is empty: give at least one.")
    return made


def one_or_several(values) -> tuple:
    """One value or several, as a tuple."""
    single = isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0
    return (values,) if single else tuple(values)


def iterable(values, name: str, remedy: str) -> Any:
    """Raises InputError for what cannot be gone through; leaves a generator as it is."""
    try:
        iter(values)
    except TypeError as error:
        raise InputError(f"{name} = {shown(values)}: {remedy}.") from error
    return values


def path(value, name: str = "path") -> Path:
    """`value` as a Path. Raises InputError unless it is a string or a path that can name a file, which may be missing."""
    if not isinstance(value, str | os.PathLike) or not str(value) or "\0" in str(value):
        raise InputError(f"{name} = {shown(value)}: give the path of a file.")
    try:
        os.stat(value)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except UnicodeEncodeError as error:
        raise InputError(f"{name} = {shown(value)}: give the path of a file.") from error
    except OSError as error:  # a name that is too long, a folder that may not be entered, links in a circle
        told = str(value) if len(str(value)) <= 200 else f"{str(value)[:98]}...{str(value)[-98:]}"  # the end says which
        raise InputError(f"{name} = {told!r} cannot be reached ({error.strerror}): check the path.") from error
    return Path(value)


def instance(value, name: str, kind: Any, remedy: str) -> Any:
    """Raises InputError unless `value` is of this class, or one of a union; `remedy`: "make it with run_clean()"."""
    if not isinstance(value, kind):
        wanted = " or ".join(one.__name__ for one in getattr(kind, "__args__", (kind,)))
        raise InputError(f"{name} is {_of_type(value)}, not of type {wanted}: {remedy}.")
    return value


def function(value, name: str, of: str) -> Any:
    """Raises InputError unless `value` can be called; `of` says with what."""
    if not callable(value):
        raise InputError(f"{name} {shown(value)} cannot be called: give a function of {of}.")
    return value


def _of_type(value) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
