"""The reference from the docstrings, as HTML that needs no network: python docs/make_reference.py [FOLDER]."""

from __future__ import annotations

import sys
from pathlib import Path

ROOMS = (
    "anatomy", "calibration", "figures", "planted", "report", "claims", "controls", "detection", "experiments", "generation",
    "interventions", "outcomes", "paths", "prompts", "records", "reproduction", "runs", "scores", "statistics", "studies", "sweeps",
)  # fmt: skip


def main(folder: Path) -> None:
    import pdoc

    import sink_circuits

    # The package imports its public names when they are first used; pdoc looks only at those that are there.
    for name in sink_circuits.__all__:
        setattr(sink_circuits, name, getattr(sink_circuits, name))
    pdoc.render.configure(docformat="markdown", math=False, show_source=False)
    pdoc.pdoc("sink_circuits", *(f"sink_circuits.{room}" for room in ROOMS), output_directory=folder)
    print(f"The reference: {folder / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference"))
