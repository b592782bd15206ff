"""Metrics of symbolic music, by theme. Pure functions over note arrays (`music.notes`); numpy and symusic, no torch.

- `continuation`: NMSI and its four parts: a continuation against the true one, on grids of bars.
- `pieces`: one piece by itself: validity, entropy, scale, groove, repetition.
- `sets`: a set of pieces against another: PerceiverS' thirteen features, KLD and OA.
- `intervals`: bootstrap intervals for every mean.

Conventions: times are seconds, pitches MIDI numbers, programs -1 for drums. Docstrings state formula, range, unit,
source and known differences from other packages. Empty and drums-only music has defined values, never NaN by accident.
"""

from .continuation import bar_grid, nmsi, self_similarity_matrix, steady_grid
from .intervals import Interval, bootstrap, bootstrap_difference
from .pieces import (
    describe_piece,
    groove_consistency,
    pitch_class_entropy,
    repeated_ngrams,
    repeated_notes_by_segment,
    repeated_notes_per_second,
    scale_consistency,
    valid_notes,
)
from .sets import (
    FEATURES,
    Comparison,
    Densities,
    bar_seconds,
    compare_sets,
    feature_densities,
    feature_summary,
    set_features,
)

__all__ = [
    "FEATURES",
    "Comparison",
    "Densities",
    "Interval",
    "bar_grid",
    "bar_seconds",
    "bootstrap",
    "bootstrap_difference",
    "compare_sets",
    "describe_piece",
    "feature_densities",
    "feature_summary",
    "groove_consistency",
    "nmsi",
    "pitch_class_entropy",
    "repeated_ngrams",
    "repeated_notes_by_segment",
    "repeated_notes_per_second",
    "scale_consistency",
    "self_similarity_matrix",
    "set_features",
    "steady_grid",
    "valid_notes",
]
