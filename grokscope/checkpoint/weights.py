"""Where a layer's weights come from: resident on the device, expanded to the compute type or kept as int8.

Expansion is numpy's work, expert by expert, so that no more than one tensor is held twice.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Literal

import jax
import numpy as np

from grokscope.checkpoint.ckpt0 import Checkpoint, Slot, slots
from grokscope.checkpoint.tensorfile import Tensor
from grokscope.config import GrokConfig
from grokscope.model.quant import QuantizedWeight, Weight, dequantize
from grokscope.model.transformer import ExpertList, Params

Form = Literal["expanded", "int8"]


@dataclasses.dataclass
class Weights:
    """All parameters on the device, in the dictionaries of grokscope.model.transformer.

    Attributes:
      ends: embedding and final norm.
      layers: one dictionary per layer.
      form: whether matrices were expanded to the compute type or are int8 with scales.
    """

    ends: Params
    layers: list[Params]
    form: Form

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.ends, self.layers)))

    def delete(self) -> None:
        for leaf in jax.tree.leaves((self.ends, self.layers)):
            leaf.delete()


def default_form(config: GrokConfig, dtype: np.dtype) -> Form:
    """Expanded on CPU where that takes at most half of the machine's memory; int8 elsewhere."""
    if jax.default_backend() != "cpu":
        return "int8"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return "expanded" if config.num_parameters * dtype.itemsize <= memory / 2 else "int8"


def load(
    checkpoint: Checkpoint,
    dtype: np.dtype,
    form: Form | None = None,
    progress: Callable[[Iterable[Slot]], Iterable[Slot]] = iter,
) -> Weights:
    """Reads a checkpoint onto the default device. Norms and router stay float32, the embedding becomes `dtype`."""
    form = form or default_form(checkpoint.config, dtype)
    ends: dict[str, dict] = {}
    layers: list[dict[str, dict]] = [{} for _ in range(checkpoint.config.num_layers)]
    for slot in progress(slots(checkpoint.config)):
        params = ends if slot.layer is None else layers[slot.layer]
        value = _placed(slot, checkpoint.read(slot), dtype, form)
        params.setdefault(slot.param.module, {})[slot.param.name] = value
    return Weights(ends, list(layers), form)


def _placed(slot: Slot, tensor: Tensor, dtype: np.dtype, form: Form) -> Weight | ExpertList:
    if slot.param.groups is None:
        return jax.device_put(tensor.weight.astype(dtype if slot.param.module == "embedding" else np.float32))

    def matrix(weight: np.ndarray, scales: np.ndarray | None) -> Weight:
        if scales is None:
            return jax.device_put(weight.astype(dtype))
        quantized = QuantizedWeight(weight, scales)
        if form == "int8":
            return jax.device_put(quantized)
        return jax.device_put(dequantize(quantized, dtype))

    if slot.param.dims[0] != "E":
        return matrix(tensor.weight, tensor.scales)
    scales = [None] * len(tensor.weight) if tensor.scales is None else tensor.scales
    return ExpertList(tuple(matrix(w, s) for w, s in zip(tensor.weight, scales, strict=True)))
