"""Which values a parameter takes, as predicates: the words in which the table of all public parameters is written."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch


def nothing(value) -> bool:
    return False


def whole(low: int = 0, high: float = 2**31 - 1) -> Callable:
    def takes(value) -> bool:
        scalar = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
            scalar = "int" in str(value.dtype)
        return scalar and low <= int(value) <= high

    return takes


def number(low: float = -math.inf, high: float = math.inf) -> Callable:
    def takes(value) -> bool:
        scalar = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
            scalar = "bool" not in str(value.dtype)
        return scalar and math.isfinite(value) and low <= value <= high

    return takes


def flag(value) -> bool:
    return isinstance(value, bool | np.bool_)


def text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def donor(value) -> bool:
    """One row. Its width, and whether it is finite, are seen in the run, where the contribution is known."""
    real = isinstance(value, torch.Tensor) and not value.is_complex() and value.dtype != torch.bool
    return real and value.numel() > 0 and (value.ndim == 1 or (value.ndim == 2 and len(value) == 1))


def direction(value) -> bool:
    return donor(value) and value.ndim == 1 and bool(value.any() and value.isfinite().all())


def own_function(value) -> bool:
    """Errors of a user's function are the user's to see: only what it returns is checked."""
    return isinstance(value, type)


def none_of_them(value) -> bool:
    """An empty list, or an iterator that holds nothing."""
    if isinstance(value, str | bytes | type) or not hasattr(value, "__iter__") or getattr(value, "ndim", 1) == 0:
        return False
    return not list(value)


def one_by_name(*names: str) -> Callable:
    """A name, or a function of one's own."""
    return lambda value: value in names if isinstance(value, str) else callable(value)


def word(*known: str) -> Callable:
    return lambda value: isinstance(value, str) and value in known


def optional(takes: Callable) -> Callable:
    return lambda value: value is None or takes(value)


def several(takes: Callable, *, empty: bool = False, one: bool = False, distinct: bool = True) -> Callable:
    """A list of such values; `one`: or one by itself."""

    def these(value) -> bool:
        if one and takes(value):
            return True
        if isinstance(value, str | bytes | dict | pd.DataFrame) or not hasattr(value, "__len__"):
            return empty and hasattr(value, "__next__")
        if getattr(value, "ndim", 1) != 1:
            return False
        items = list(value)
        taken = all(map(takes, items)) and (bool(items) or empty)
        return taken and (not distinct or len({int(i) if takes is not text else i for i in items}) == len(items))

    return these


def tokens(value) -> bool:
    """Ids in the vocabulary, one text or several. (The planted model has no tokenizer: no strings.)"""
    rows = value if isinstance(value, list | tuple) else [value]
    if isinstance(value, list) and value and all(isinstance(row, list) for row in value):
        return all(whole(0, 63)(i) for row in value for i in row)
    return bool(rows) and all(
        isinstance(row, torch.Tensor) and row.ndim in (1, 2) and row.numel() and not row.is_floating_point()
        for row in rows
    )


def real(value) -> bool:
    """Numbers of any shape, NaN and infinities included."""
    if isinstance(value, str | bytes | dict):
        return False
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        return False
    return array.dtype.kind in "iuf" or (
        array.dtype.kind == "O" and all(isinstance(one, int) and not isinstance(one, bool) for one in array.flat)
    )


def values(*lengths: int) -> Callable:
    """Finite numbers or NaN, with so many of them along each axis."""

    def takes(value) -> bool:
        return real(value) and np.shape(value) == lengths and not np.isinf(np.asarray(value, dtype=float)).any()

    return takes


def pvalues(value) -> bool:
    return real(value) and not ((np.asarray(value, dtype=float) < 0) | (np.asarray(value, dtype=float) > 1)).any()


def inside(value) -> bool:
    return number(0, 1)(value) and 0 < value < 1


def up_to_one(value) -> bool:
    return number(0, 1)(value) and value > 0


def labels(n: int) -> Callable:
    """So many names or numbers."""
    return lambda value: isinstance(value, list | torch.Tensor) and np.shape(value) == (n,) and value[0] is not None


def seed(value) -> bool:
    return isinstance(value, str | int | np.integer) and not isinstance(value, bool)
