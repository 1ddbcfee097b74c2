"""Calibration: every instrument held to planted circuits, over many random plants. Does it find what is there, no more?

A plant's truth is known because it was put in (`sink_circuits.planted`), so an answer is right or wrong. `calibrate` builds
plants, with a circuit and without, asks every judge about them and returns the table. Rooms: `subjects` (a plant as the
instruments meet it), judges in `finding`, `causes` and `populations`, `table`.
"""

from sink_circuits.calibration.subjects import Answer, Judge, Judged, Row, Subject, subject_of
from sink_circuits.calibration.table import (
    JUDGES,
    NULL_JUDGES,
    ROWS,
    Calibration,
    calibrate,
    judge_null_plant,
    judge_plant,
)

__all__ = [
    "JUDGES", "NULL_JUDGES", "ROWS", "Answer", "Calibration", "Judge", "Judged", "Row", "Subject", "calibrate",
    "judge_null_plant", "judge_plant", "subject_of",
]  # fmt: skip
