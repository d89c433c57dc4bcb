"""Traces -> findings: tidy DataFrames with counts, nulls and intervals. numpy and pandas, no jax.

    from grokscope import analysis
    analysis.load(dump)                       # share of each expert, against 1/E
    analysis.specialisation(dump, "class")    # does routing depend on the kind of token, at which layer
    analysis.lift(dump, "class")              # what does expert 5 of layer 3 take

Everything takes a Trace, a list of Traces or a Dump, which is read prompt by prompt. `phase` is "each" (prefill and
decode apart), "all" (joined), "prefill" or "decode"; it is a column of every table. Bootstraps resample prompts; all
draws follow from a seed.
"""

from grokscope.analysis.attention import by_class, heads, shown
from grokscope.analysis.compare import Comparison, compare
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

__all__ = [
    "Comparison", "by_class", "coactivation", "compare", "entropy", "heads", "kept_mass", "lift", "load", "margin",
    "shown", "specialisation", "transitions", "vocabulary",
]  # fmt: skip
