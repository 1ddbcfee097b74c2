"""Agreement of an attribution with exact runs: by hand, with itself, with another map."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from attributions import found, planted
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sink_circuits.attribution import agreement, compare
from sink_circuits.errors import InputError


def test_agreement_of_a_hand_made_case():
    nan = math.nan
    attribution = [[-1.0, 0.1, -0.5, -0.1, 0.02, nan], [1.0, 2.0, 3.0, 4.0, nan, nan], [nan, 0.0, 0.0, 0.0, nan, nan]]
    exact = [[-0.9, -2.0, -1.5, -4.0, 0.01, -9.0], [4.0, 3.0, 2.0, 1.0, nan, nan], [nan, 0.0, 0.0, 0.0, nan, nan]]
    direct = [[-1.0, -1.5, -0.5, -0.3, 0.02, nan], [1.0, 2.0, 3.0, 4.0, nan, nan], [nan, 0.0, 0.0, 0.0, nan, nan]]
    result = compare(*(xr.DataArray(values, dims=("sink", "layer")) for values in (attribution, exact, direct)))
    table = result.table
    # Ranks of the first sink, from the most negative: 1 4 2 3 5 against 3 2 ... by Spearman's formula 1 - 6 sum d^2 / (n^3 - n).
    d = np.array([1, 5, 2, 3, 4]) - np.array([4, 2, 3, 1, 5])
    assert table["rank_correlation"].tolist() == pytest.approx([1 - 6 * (d**2).sum() / 120, -1.0, nan], nan_ok=True)
    assert table["n_layers"].tolist() == [5, 4, 3]
    assert table["recall"].tolist() == pytest.approx(
        [2 / 3, 2 / 3, nan], nan_ok=True
    )  # {3, 1, 2} against {0, 2, 1}, for 1 ties with 3
    assert table["largest_exact"].tolist() == [3, 0, -1]
    assert table["largest_attributed"].tolist() == [0, 3, 1]
    misses = result.misses
    assert misses[["sink", "layer", "miss", "reason"]].values.tolist() == [
        [0, 1, "false negative", "cancellation"],  # the direct part has most of it
        [0, 3, "false negative", "saturation"],
    ]
    assert result.false_negatives[["exact", "attribution", "direct"]].values.tolist() == [
        [-2.0, 0.1, -1.5],
        [-4.0, -0.1, -0.3],
    ]
    path = compare(*(xr.DataArray(values, dims=("sink", "layer")) for values in (exact, attribution)), k=9)
    assert path.misses[["layer", "miss", "reason"]].values.tolist() == [
        [1, "false positive", "stand-in"],
        [3, "false positive", "stand-in"],
    ]
    assert path.table["k"].tolist() == [5, 4, 3]
    assert path.table["recall"].tolist() == pytest.approx([1.0, 1.0, nan], nan_ok=True)


effects = arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(1, 8)),
    elements=st.floats(-100, 100, width=16) | st.just(math.nan),
)


@settings(max_examples=50)
@given(effects, st.floats(0.5, 2), st.integers(1, 10))
def test_what_agrees_with_itself(values, factor, k):
    exact = xr.DataArray(values, dims=("sink", "layer"))
    result = compare(factor * exact, exact, k=k)
    assert result.misses.empty
    assert ((result.table["recall"] == 1) | result.table["recall"].isna()).all()
    rank = result.table["rank_correlation"].dropna()
    assert rank.to_numpy() == pytest.approx(1)
    assert (result.table["n_layers"] == exact.notnull().sum("layer")).all()


def test_agreement_with_another_map():
    _, _, _, exact = found()
    result = planted("gradient")
    again = agreement(result, exact, k=1)
    assert again.table["recall"].tolist() == [1.0]
    pd.testing.assert_frame_equal(again.misses, result.agreement.misses)
    with pytest.raises(InputError, match="layer_map"):
        agreement(result, dataclasses.replace(exact, kind="ablate"))
    with pytest.raises(InputError, match="layer_map"):
        agreement(result, dataclasses.replace(exact, table=exact.table.assign(pos=1)))
    for k, large in ((0, 0.5), (1, 0.0)):
        with pytest.raises(InputError, match="k is at least 1"):
            agreement(result, exact, k=k, large=large)
    with pytest.raises(InputError, match="must agree"):
        compare(result.data["attribution"], result.data["exact"][:, 1:])
