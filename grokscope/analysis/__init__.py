"""Traces -> findings: tidy DataFrames with counts, nulls and intervals. numpy and pandas, no jax.

    from grokscope import analysis
    analysis.load(dump)                       # share of each expert, against 1/E
    analysis.specialisation(dump, "class")    # does routing depend on the kind of token, at which layer
    analysis.lift(dump, "class")              # what does expert 5 of layer 3 take

What reads runs takes a Trace, a list of Traces or a Dump, which is read prompt by prompt. `phase` is "each" (prefill
and decode apart), "all" (joined), "prefill" or "decode", and a column of the table. Bootstraps resample prompts, of
which they need five; all draws follow from a seed.
"""

import importlib
from typing import TYPE_CHECKING

from grokscope.analysis.attention import by_class, heads, read_at_swaps, shown
from grokscope.analysis.compare import Comparison, compare
from grokscope.analysis.lens import ATTRIBUTION, attribution, lens
from grokscope.analysis.routing import (
    coactivation,
    entropy,
    kept_mass,
    lift,
    load,
    margin,
    specialisation,
    transitions,
    vocabulary,
)

if TYPE_CHECKING:
    from grokscope.analysis.causal import ablations, counterfactuals, patching, path_patching, sweep

_CAUSAL = ("ablations", "counterfactuals", "patching", "path_patching", "sweep")  # they run the model: with jax

__all__ = [
    "ATTRIBUTION", "Comparison", "ablations", "attribution", "by_class", "coactivation", "compare", "counterfactuals",
    "entropy", "heads", "kept_mass", "lens", "lift", "load", "margin", "patching", "path_patching", "read_at_swaps",
    "shown", "specialisation", "sweep", "transitions", "vocabulary",
]  # fmt: skip


def __getattr__(name: str):
    if name in _CAUSAL:
        return getattr(importlib.import_module("grokscope.analysis.causal"), name)
    raise AttributeError(f"module 'grokscope.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
