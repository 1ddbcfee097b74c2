"""Anatomy: how a sink is made, carried and erased. Each function returns a labelled result that draws and saves itself.

Stages of the forming MLP, writers and erasers, neurons (and their ablation), norms, levels, score by lifetime,
principal components and the MLP's response along them, clustering, matrix entropy, geometry of keys and queries, attention
patterns around sinks.
Everything but `ablate_neurons` observes; what causes a sink is for `sink_circuits.experiments` to say.
"""

from sink_circuits.anatomy.carriers import Neurons, ablate_neurons, against_random, neurons
from sink_circuits.anatomy.direct_writes import Writers, writers
from sink_circuits.anatomy.geometry import Clustering, Pca, clustering, pca
from sink_circuits.anatomy.heads import KeyQueryGeometry, key_query_geometry
from sink_circuits.anatomy.patterns import AttentionPatterns, attention_patterns
from sink_circuits.anatomy.profiles import (
    Levels,
    NormsByLayer,
    ScoreByLifetime,
    levels,
    norms_by_layer,
    score_by_lifetime,
)
from sink_circuits.anatomy.result import Anatomy
from sink_circuits.anatomy.spectra import MatrixEntropy, matrix_entropy
from sink_circuits.anatomy.stages import MlpStages, mlp_stages

__all__ = [
    "Anatomy", "AttentionPatterns", "Clustering", "KeyQueryGeometry", "Levels", "MatrixEntropy", "MlpStages", "Neurons",
    "NormsByLayer", "Pca", "ScoreByLifetime", "Writers", "ablate_neurons", "against_random", "attention_patterns", "clustering",
    "key_query_geometry", "levels", "matrix_entropy", "mlp_stages", "neurons", "norms_by_layer", "pca", "score_by_lifetime", "writers",
]  # fmt: skip
