"""The minimal planted model: one circuit with everything in it, the same each time."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from sink_circuits import arguments
from sink_circuits.planted.architectures import ARCHITECTURES
from sink_circuits.planted.build import build, n_eraser_neurons
from sink_circuits.planted.circuits import Decoy, Recipe, Shape, Sink, Write, generator
from sink_circuits.planted.models import Planted

PARTS = ("primary", "secondary", "stand_in", "decoy", "shared", "eraser")
BOS, SECONDARY, DECOY = 0, 1, 2  # token ids; ordinary ones are above
SHAPE = Shape(n_layers=24, d_mlp=32, n_ctx=1024)
PRIMARY_NORM, SECONDARY_NORM = 80.0, 40.0


def minimal(without: Collection[str] = ()) -> Planted:
    """The smallest circuit with everything in it: primary, secondary with a stand-in, decoy, shared direction, erasers.

    A Llama of 24 layers. MLP 2 reads "this token is BOS" and writes along the sink direction: the primary sink, until MLP
    21 erases it. MLPs 6 and 7 do so at the secondary kind of token, each enough alone; MLP 13 erases it. With MLP 6 there,
    the feature that MLP 7 reads is normalised down: it adds less, but reads the sink too, so that both write visibly.
    MLP 4 writes as large a vector along another direction at the decoy token, which no key reads. `without` names parts
    (`PARTS`) whose weights are left out: the negative twin of each planted fact. Raises InputError for an unknown part.
    """
    given = [without] if isinstance(without, str) else arguments.several(without, "without", empty=True)
    without = {arguments.one_of(part, "without:", PARTS) for part in given}
    erasing = tuple(range(n_eraser_neurons(ARCHITECTURES["llama"])))
    parts: list[tuple[Write, tuple[str, ...]]] = [
        (Write(2, BOS, "sink", "form", (0,), PRIMARY_NORM), ("primary",)),
        (Write(4, DECOY, "decoy", "form", (0,), SECONDARY_NORM), ("decoy",)),
        (Write(6, SECONDARY, "sink", "form", (0,), SECONDARY_NORM), ("secondary",)),
        (Write(7, SECONDARY, "sink", "stand_in", (0,), SECONDARY_NORM), ("secondary", "stand_in")),
        (Write(13, SECONDARY, "sink", "erase", erasing, spares=(BOS,)), ("eraser",)),
        (Write(21, BOS, "sink", "erase", erasing), ("eraser",)),
    ]
    writes = tuple(write for write, of in parts if not without & set(of))
    decoys = tuple(Decoy(DECOY, "norm", write.layer, False) for write in writes if write.feature == "decoy")
    recipe = Recipe("", "llama", SHAPE, 3, writes, _sinks(writes), decoys, shared="shared" not in without)
    prompt = torch.randint(3, SHAPE.d_vocab, (SHAPE.n_ctx,), generator=generator("tokens/calibration"))[:96]
    prompt[0], prompt[40], prompt[60] = BOS, SECONDARY, DECOY
    model, truth = build(recipe, prompt)
    return Planted(model, recipe, truth)


def _sinks(writes: Sequence[Write]) -> tuple[Sink, ...]:
    """The sinks that the writes form, one for each kind of token."""
    sinks = []
    for token, kind, norm in ((BOS, "primary", PRIMARY_NORM), (SECONDARY, "secondary", SECONDARY_NORM)):
        forming = [w for w in writes if w.token == token and w.feature == "sink" and w.role != "erase"]
        eraser = next((w.layer for w in writes if w.token == token and w.role == "erase"), None)
        if forming:
            layers = tuple(sorted(w.layer for w in forming))
            l_end = SHAPE.n_layers - 1 if eraser is None else eraser - 1
            redundancy = "stand_in" if len(forming) > 1 else "one"
            neurons = tuple(w.neurons for w in forming)
            sinks.append(Sink(token, kind, layers[0], l_end, layers, eraser, redundancy, neurons, norm))
    return tuple(sinks)
