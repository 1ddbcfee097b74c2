"""The memory that is foretold, against the kernel's own peak, and what a budget allows."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from common import BACKENDS, SINK, lens, no_forward_pass, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

import sink_circuits as sc
from sink_circuits.adapters import adapt
from sink_circuits.errors import InputError
from sink_circuits.memory import BATCH_BYTES, BATCH_TOKENS, GIB, Need, available, need_of, rows_within

SMALL = 1e-4  # GiB: less than a planted prompt's clean run takes


@functools.cache
def secondary() -> sc.Sinks:
    return sc.find_sinks(lens(), prompt(), verbose=False).select("secondary")


@given(clean=st.integers(0, 1 << 33), row=st.integers(1, 1 << 33), memory=st.floats(0.01, 16))
@settings(max_examples=200, deadline=None)
def test_rows_fit_the_budget_or_are_refused(clean, row, memory):
    if clean + row > memory * GIB:
        with pytest.raises(InputError, match=r"a text of 77 tokens needs about .* GiB are allowed by memory="):
            rows_within(memory, adapt(lens()), Need(clean, row), 77)
        return
    rows = rows_within(memory, adapt(lens()), Need(clean, row), 77)
    assert rows >= 1
    most = BATCH_TOKENS * torch.get_num_threads()
    assert rows == 1 or (clean + rows * row <= memory * GIB and rows * row <= BATCH_BYTES and rows * 77 <= most)


def test_without_a_budget_what_is_free_is_the_limit():
    free = available(torch.device("cpu"))
    assert 0 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(InputError, match="GiB are free: cut the text"):
        rows_within(None, adapt(lens()), Need(free, free), 77)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["fast", "reference"])
def test_need_grows_with_all_that_makes_it(backend, path):
    adapter = adapt(lens(backend))
    need = functools.partial(need_of, adapter, path=path)
    for less, more in (
        (need(512), need(1024)),
        (need(512, n_chosen=1), need(512, n_chosen=9)),
        (need(512), need(512, logits=True)),
    ):
        assert less.clean < more.clean
        assert less.row <= more.row
    assert need(512, resumable=False).clean <= need(512).clean
    grown = need(1 << 16).row / need(1 << 15).row
    assert grown > 3 if path == "reference" else grown == pytest.approx(2, rel=1e-3)  # whole patterns, or none


@pytest.mark.parametrize(
    "run",
    [
        lambda **o: sc.find_sinks(lens(), prompt(), **o),
        lambda **o: sc.layer_map(lens(), prompt(), secondary(), layers=[3], **o),
        lambda **o: sc.ablate(lens(), prompt(), secondary(), layer=3, loss=True, **o),
        lambda **o: sc.path_effects(lens(), prompt(), secondary(), layer=3, **o),
        lambda **o: sc.mass_account(lens(), prompt(), secondary(), layer=3, **o),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("memory", "message"),
    [(SMALL, "GiB are allowed"), (0, "memory = 0"), ("2", "memory = '2'"), (float("nan"), "memory = nan")],
)
def test_what_does_not_fit_is_said_before_anything_runs(run, memory, message):
    secondary()
    with no_forward_pass(), pytest.raises(InputError, match=message):
        run(memory=memory, verbose=False)


def test_a_small_budget_makes_small_batches_of_the_same_numbers():
    adapter = adapt(lens())
    need = need_of(adapter, len(prompt()), n_chosen=2)
    tight = (need.clean + 1.5 * need.row) / GIB
    assert rows_within(tight, adapter, need, len(prompt())) == 1
    seen: dict[float | None, set[int]] = {}
    made = {}
    for memory in (None, tight):
        sizes = seen.setdefault(memory, set())
        block = adapter.twin.blocks[-1]
        handle = block.register_forward_pre_hook(lambda module, args, sizes=sizes: sizes.add(len(args[0])))
        try:
            made[memory] = sc.dose_response(
                lens(), prompt(), secondary(), layer=2, factors=[0, 0.5, 2], memory=memory, verbose=False
            )
        finally:
            handle.remove()
    assert seen == {None: {1, 3}, tight: {1}}
    for name in made[None].data:
        np.testing.assert_allclose(made[tight].data[name], made[None].data[name], atol=1e-5, rtol=1e-5)
    assert made[None].table["pos"].tolist() == [SINK]


# --------------------------------------------------------------------------------------------- against the kernel
def measured_peaks(name: str, n: int) -> str:
    """MiB beyond what was held before: of finding, of a clean run, of one edited row and of four. In a process of its own."""
    torch.set_num_threads(1)
    model = sc.load_model(name, verbose=False)
    ids = torch.cat(list(sc.load_prompts("maths").tokens(model)))[:n]
    sc.find_sinks(model, ids[:64], verbose=False)
    kept: list = []

    def row(i: int):
        return [sc.rescale(0, n // 8, 1 / (i + 2))]

    works = {
        "find": lambda: sc.find_sinks(model, ids, verbose=False),
        "clean": lambda: kept.append(sc.run_clean(model, ids, chosen=(0, n // 8))),
        "one row": lambda: sc.run_edited(model, kept[0], [row(0)]),
        "four rows": lambda: sc.run_edited(model, kept[0], [row(i) for i in range(4)]),
    }
    return json.dumps({name: peak_extra(work) for name, work in works.items()})


def peak_extra(work) -> float:
    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel's peak cannot be reset here")
def test_estimates_are_near_the_measured_peaks():
    n = 2048
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        peaks = json.loads(pool.submit(measured_peaks, "smollm2-135m", n).result())
    adapter = adapt(sc.load_model("smollm2-135m", verbose=False))
    need, found = need_of(adapter, n, n_chosen=2), need_of(adapter, n, n_chosen=0, resumable=False)
    mib = 1 << 20
    for name, estimate in (
        ("find", found.clean), ("clean", need.clean), ("one row", need.row), ("four rows", 4 * need.row),
    ):  # fmt: skip
        # Allocators keep what they were given, and a process grows in steps: to within a quarter and 64 MiB.
        assert peaks[name] < 1.25 * estimate / mib + 64, name
        assert peaks[name] > estimate / mib / 3, name
