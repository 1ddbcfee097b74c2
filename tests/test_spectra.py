"""Matrix entropy: bounds, a closed form, with and without sinks."""

import math

import numpy as np
import pytest
import torch
from anatomies import QUIET, found
from common import SINK, by_hand, lens, prompt, subject
from hypothesis import given, settings
from hypothesis import strategies as st

from sink_circuits import anatomy
from sink_circuits.anatomy import spectra
from sink_circuits.errors import InputError


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.floats(0.01, 100))
@settings(max_examples=40)
def test_entropy_lies_between_one_direction_and_all(n, d, seed, factor):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    entropy = spectra.spectral_entropy(x)
    assert -1e-9 <= entropy <= math.log(min(n, d)) + 1e-9
    assert spectra.spectral_entropy(factor * x) == pytest.approx(entropy, abs=1e-9)
    p = np.linalg.svd(x.numpy(), compute_uv=False) ** 2
    p = p / p.sum()
    assert entropy == pytest.approx(-(p * np.log(np.where(p > 0, p, 1))).sum(), abs=1e-6)


def test_entropy_in_closed_form():
    assert spectra.spectral_entropy(torch.eye(7, dtype=torch.float64)) == pytest.approx(math.log(7))
    assert spectra.spectral_entropy(torch.ones(5, 3, dtype=torch.float64)) == pytest.approx(0, abs=1e-9)
    assert math.isnan(spectra.spectral_entropy(torch.zeros(3, 3, dtype=torch.float64)))
    assert math.isnan(spectra.spectral_entropy(torch.zeros(0, 3, dtype=torch.float64)))


def test_matrix_entropy_with_and_without_sinks():
    short = subject().tokens(n_tokens=20, sinks=(), decoys=(), seed_name="b")
    result, run = (
        anatomy.matrix_entropy(lens(), [prompt(), short], found(), layers=[1, 8], seen=[10, 50], **QUIET),
        by_hand(prompt()),
    )
    for i, layer in enumerate((1, 8)):
        for j, seen in enumerate((10, 50)):
            rows = run.residuals[layer, :seen]
            kept = [pos for pos in range(seen) if pos not in (0, SINK)]
            assert float(result.data["entropy"][0, 0, i, j]) == pytest.approx(spectra.spectral_entropy(rows), abs=1e-4)
            assert float(result.data["entropy"][0, 1, i, j]) == pytest.approx(
                spectra.spectral_entropy(rows[kept]), abs=1e-4
            )
    assert (
        result.data["entropy"].sel(prompt=1, seen=50).isnull().all()
        and result.data["entropy"].sel(prompt=1, seen=10).notnull().all()
    )
    with pytest.raises(InputError, match="seen"):
        anatomy.matrix_entropy(lens(), [prompt()], found(), seen=[0])
