"""PARAMS: every weight of the network once: its place on disk, its name in Haiku, its dims and its initialiser.

Two names for a weight, one table. The released paths stay on disk; the Haiku modules use names that say what the
matrix does. A layer's weights are the rows with `layered=True`; their order is the order of the release.
"""

import dataclasses
import math

import haiku as hk

from grokscope.config import GrokConfig


@dataclasses.dataclass(frozen=True)
class Param:
    """One weight. Dims as in GrokConfig.dims; the axis before the last is the one that is contracted."""

    path: str  # in the release, below language_model/ or transformer/decoder_layer_{L}/
    module: str  # Haiku module
    name: str  # Haiku parameter
    dims: tuple[str, ...]
    init: str  # "fan_in": std 1/sqrt(second to last dim); "embed": std 1/sqrt(D); "one"; "post_norm": 1/sqrt(2L)
    groups: int | None = None  # scale groups when written quantised; None: stored as float32
    layered: bool = True

    def shape(self, config: GrokConfig) -> tuple[int, ...]:
        return tuple(config.dims[d] for d in self.dims)


PARAMS: tuple[Param, ...] = (
    Param("in_out_embed/embeddings", "embedding", "w", ("V", "D"), "embed", layered=False),
    Param("rms_norm/scale", "embedding/final_norm", "scale", ("D",), "one", layered=False),
    Param("moe/linear/w", "layer/experts", "gate", ("E", "D", "F"), "fan_in", groups=1),
    Param("moe/linear_1/w", "layer/experts", "down", ("E", "F", "D"), "fan_in", groups=8),
    Param("moe/linear_v/w", "layer/experts", "up", ("E", "D", "F"), "fan_in", groups=1),
    Param("multi_head_attention/key/w", "layer/attention", "key", ("D", "GC"), "fan_in", groups=1),
    Param("multi_head_attention/linear/w", "layer/attention", "out", ("HC", "D"), "fan_in", groups=8),
    Param("multi_head_attention/query/w", "layer/attention", "query", ("D", "HC"), "fan_in", groups=1),
    Param("multi_head_attention/value/w", "layer/attention", "value", ("D", "GC"), "fan_in", groups=1),
    Param("rms_norm/scale", "layer/pre_attention_norm", "scale", ("D",), "one"),
    Param("rms_norm_1/scale", "layer/post_attention_norm", "scale", ("D",), "post_norm"),
    Param("rms_norm_2/scale", "layer/pre_moe_norm", "scale", ("D",), "one"),
    Param("rms_norm_3/scale", "layer/post_moe_norm", "scale", ("D",), "post_norm"),
    Param("router/w", "layer/router", "w", ("D", "E"), "fan_in"),
)

GLOBAL_PARAMS = tuple(p for p in PARAMS if not p.layered)
LAYER_PARAMS = tuple(p for p in PARAMS if p.layered)


def initializer(param: Param, config: GrokConfig) -> hk.initializers.Initializer:
    """A float32 start for training. Post-norm scales of 1/sqrt(2L) keep the stream of order one at any depth."""
    match param.init:
        case "one":
            return hk.initializers.Constant(1.0)
        case "post_norm":
            return hk.initializers.Constant(1 / math.sqrt(2 * config.num_layers))
        case "embed":
            return hk.initializers.RandomNormal(1 / math.sqrt(config.emb_size))
        case _:
            return hk.initializers.RandomNormal(1 / math.sqrt(param.shape(config)[-2]))
