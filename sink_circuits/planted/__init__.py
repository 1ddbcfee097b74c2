"""Models with a sink circuit put in by hand: the known answer every instrument is held to. Nothing is trained.

The residual stream is spanned by an orthonormal set of named directions and, orthogonal to them, a noise space in which
tokens differ:

- every token carries the `shared` direction; all queries read it, so they are the same wherever no sink has formed;
- forming MLPs read "this token is ..." and write along `sink`; erasers take it back;
- keys of the sink heads read `sink`, so a token in sink state after block l draws attention in block l + 1;
- decoys are as large along a direction of their own, or drawn by heads for what their embedding holds.

Attention outputs and the other neurons write small vectors into the noise space only, so they never make or break a
planted state. `minimal()` is one fixed circuit; `random_plant(name)` draws one, in one of six architectures (`VARIANTS`);
`null_plant(name)` is the same without any sink.
"""

from sink_circuits.planted.circuits import Decoy, Recipe, Shape, Sink, Truth, Write
from sink_circuits.planted.draw import VARIANTS, null_plant, random_plant
from sink_circuits.planted.minimal_circuit import PARTS, minimal
from sink_circuits.planted.models import Plant, Planted

__all__ = [
    "PARTS", "VARIANTS", "Decoy", "Plant", "Planted", "Recipe", "Shape", "Sink", "Truth", "Write", "minimal", "null_plant", "random_plant",
]  # fmt: skip
