"""Numbers and lists of numpy and torch do what Python's do."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from common import SINK, lens, prompt
from doors import at, found, on

import sink_circuits as sc

SAME = {
    "positions and layers": (
        lambda: sc.run_clean(lens(), prompt(), chosen=(0, SINK)).columns.log_attention,
        lambda: sc.run_clean(lens(), prompt(), chosen=torch.tensor([0, SINK])).columns.log_attention,
        lambda: sc.run_clean(lens(), prompt().tolist(), chosen=np.array([0, SINK])).columns.log_attention,
    ),
    "scores": (
        lambda: sc.sink_scores(lens(), prompt(), keys=[0, SINK], min_queries=8).scores[0],
        lambda: sc.sink_scores(lens(), prompt().numpy()[None], keys=np.array([0, SINK]), min_queries=np.int16(8)).scores[0],
        lambda: sc.sink_scores(lens(), prompt()[None].int(), keys=torch.tensor([0, SINK]), min_queries=torch.tensor(8)).scores[0],
    ),
    "sinks": (
        lambda: found().table,
        lambda: sc.find_sinks(**on(cosine=np.float64(0.9), bridge=np.int64(1), first_positions=np.arange(4), verbose=False)).table,
        lambda: sc.find_sinks(lens(), prompt(), min_lifetime=2.0, min_queries=torch.tensor(16), verbose=np.False_).table,
    ),
    "doses": (
        lambda: sc.dose_response(**at(layer=6, factors=[0, 2])).data["score"].values,
        lambda: sc.dose_response(**at(layer=np.int64(6), factors=np.array([0.0, 2.0]), batch_size=np.int32(1))).data["score"].values,
        lambda: sc.dose_response(**at(layers=torch.tensor([6]), factors=torch.tensor([0, 2]))).data["score"].values,
    ),
    "a study": (
        lambda: sc.Study(models=["m"], layers=[3, [6, 7]], factors=[0, 0.5], threads=1, min_queries=8).to_dict(),
        lambda: sc.Study(
            models=np.array(["m"]), layers=(np.int64(3), (np.int64(6), 7)), factors=np.array([0, 0.5]), threads=np.int64(1),
            min_queries=np.int8(8),
        ).to_dict(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_numbers_of_numpy_and_torch_do_what_pythons_do(what):
    plain, *others = (make() for make in SAME[what])
    for other in others:
        if isinstance(plain, pd.DataFrame):
            pd.testing.assert_frame_equal(other, plain)
        elif isinstance(plain, dict):
            assert other == plain
        else:
            np.testing.assert_array_equal(np.asarray(other), np.asarray(plain))
