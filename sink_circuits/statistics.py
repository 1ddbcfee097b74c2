"""Statistics: intervals and tests over prompts, thin over scipy. The unit is the prompt, never the token or the sink."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.stats

from sink_circuits.errors import InputError

N_RESAMPLES = 4999


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its bootstrap interval; `low` and `high` are NaN for fewer than two prompts."""

    mean: float
    low: float
    high: float
    n: int


def seed_of(*names) -> int:
    """A seed from names: any single cell run again alone draws the same numbers."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, names)).encode()).digest()[:8], "little")


def prompt_means(values, prompts) -> np.ndarray:
    """One number per prompt: the mean over its sinks, NaN left out; prompts with nothing left are dropped."""
    frame = pd.DataFrame({"prompt": list(prompts), "value": np.asarray(values, dtype=float)}).dropna()
    return frame.groupby("prompt", sort=False)["value"].mean().to_numpy()


def bootstrap_over_prompts(values, prompts, *, name: str, confidence: float = 0.95) -> Estimate:
    """Mean of the prompts' means with a percentile bootstrap interval over prompts (clusters; Efron & Tibshirani, ch. 13).

    `values`: one per sink; `prompts`: which prompt each belongs to. Raises InputError for a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence {confidence} is out of range: between 0 and 1, 0.95 for example.")
    means = prompt_means(values, prompts)
    if len(means) == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    if len(means) == 1:
        return Estimate(float(means[0]), np.nan, np.nan, 1)
    if np.ptp(means) == 0:
        return Estimate(float(means[0]), float(means[0]), float(means[0]), len(means))
    interval = scipy.stats.bootstrap(
        (means,), np.mean, confidence_level=confidence, n_resamples=N_RESAMPLES, method="percentile",
        rng=np.random.default_rng(seed_of("bootstrap", name)),
    ).confidence_interval  # fmt: skip
    return Estimate(float(means.mean()), float(interval.low), float(interval.high), len(means))
