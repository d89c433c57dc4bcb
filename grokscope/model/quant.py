"""int8 weights with grouped scales, as Grok-1 is released, and the one product that knows about them.

weight[..., k, n] = int8[..., k, n] * scales[..., k // (K / G), n]: G groups along the contracting axis K. The release
has G = 1 for the matrices it splits by column and G = 8 for those it splits by row; any G that divides K works.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from grokscope.model import kernel
from grokscope.model.sharding import on_its_own

HIGHEST = jax.lax.Precision.HIGHEST  # float32 means float32: GPUs otherwise round products to TF32
WIDENED = 1 << 22  # int8 values that are float32 at a time: 16 MB


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """int8 matrix (or stack of matrices) and its scales. A pytree; numpy or jax arrays alike.

    Attributes:
      weight: int8 [..., K, N].
      scales: bfloat16 or float32 [..., G, N].
    """

    weight: Any  # numpy or jax; or its description (jax.ShapeDtypeStruct)
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it stands for: what hk.get_parameter compares."""
        return self.weight.shape

    @property
    def num_groups(self) -> int:
        return self.scales.shape[-2]

    def __getitem__(self, index) -> "QuantizedWeight":
        """Matrix `index` of a stack; with None a stack of this one."""
        return QuantizedWeight(self.weight[index], self.scales[index])


Weight = Array | QuantizedWeight


def quantize(weight: np.ndarray, groups: int) -> QuantizedWeight:
    """Symmetric int8 with one bfloat16 scale per group and column; the largest entry of a column becomes +-127."""
    *lead, k, n = weight.shape
    if k % groups:
        raise ValueError(f"{groups} scale groups do not divide the contracting axis of {weight.shape}")
    grouped = np.asarray(weight, np.float32).reshape(*lead, groups, k // groups, n)
    scales = (np.abs(grouped).max(-2) / 127).astype(ml_dtypes.bfloat16)
    scales = np.where(scales == 0, np.ones_like(scales), scales)
    steps = np.rint(grouped / scales.astype(np.float32)[..., None, :])
    return QuantizedWeight(np.clip(steps, -127, 127).astype(np.int8).reshape(weight.shape), scales)


def dequantize(weight: QuantizedWeight, out: np.ndarray | None = None) -> np.ndarray:
    """The matrix as numpy float32, or in `out`, contiguous, in its type: products rounded once, so that bfloat16 equals
    a bfloat16 product."""
    *lead, k, n = weight.shape
    int8, scales = np.asarray(weight.weight), np.asarray(weight.scales).astype(np.float32)
    grouped = int8.reshape(*lead, weight.num_groups, k // weight.num_groups, n)
    out = np.empty(weight.shape, np.float32) if out is None else out
    np.multiply(grouped, scales[..., None, :], out=out.reshape(grouped.shape), dtype=np.float32, casting="unsafe")
    return out


def widened_in_parts(w: Weight) -> bool:
    """Whether CPUs have no more than a part of it as float32 at a time."""
    return isinstance(w, QuantizedWeight) and math.prod(w.shape) > WIDENED


def matmul(x: Float[Array, "*batch K"], w: Weight) -> Float[Array, "*batch N"]:
    """x @ w in the type of x; of int8 scaled and added up in float32."""
    rows = x.reshape(x.shape[-1]) if x.size == x.shape[-1] else x  # of [1, K] XLA on CPU makes copies
    if not isinstance(w, QuantizedWeight):
        out = jnp.matmul(rows, w, precision=HIGHEST)
    elif in_kernel(x.dtype, w) and on_its_own():
        out = _in_tiles(x.reshape(-1, x.shape[-1]), w)
    elif jax.default_backend() != "cpu":
        out = _in_groups(rows, w)
    else:  # in float32: XLA there has no product of bfloat16 into it
        out = (_in_blocks if on_its_own() else _in_groups)(rows.astype(jnp.float32), w)
    return out.astype(x.dtype).reshape(*x.shape[:-1], w.shape[1])


def in_kernel(dtype, w: Weight) -> bool:
    """Whether rows of this type are multiplied with it by grokscope.model.kernel."""
    return kernel.available() and dtype == jnp.bfloat16 and isinstance(w, QuantizedWeight)


def _in_tiles(x: Float[Array, "M K"], w: QuantizedWeight) -> Float[Array, "M N"]:
    rows = len(x)
    tile = kernel.tile_size(rows)
    tiles = kernel.Tiles.of(jnp.zeros(1, jnp.int32), jnp.full(1, rows, jnp.int32), tile, rows)
    return kernel.products(x, [w[None]], tiles, tile)


def _in_groups(x: Float[Array, "*batch K"], w: QuantizedWeight) -> Float[Array, "*batch N"]:
    groups, (k, n) = w.num_groups, w.shape
    x_groups = x.reshape(*x.shape[:-1], groups, k // groups)
    w_groups = w.weight.reshape(groups, k // groups, n).astype(x.dtype)
    products = jnp.einsum("...gk,gkn->...gn", x_groups, w_groups, precision=HIGHEST, preferred_element_type=jnp.float32)
    return jnp.sum(products * w.scales.astype(jnp.float32), axis=-2)


def _in_blocks(x: Float[Array, "*batch K"], w: QuantizedWeight) -> Float[Array, "*batch N"]:
    """One product with a matrix of at most WIDENED values, scaled; of a larger one a group, halved until it is no
    larger, at a time.

    For XLA on CPU: products over groups are slow there, and the float32 of a matrix of Grok-1's width is new memory
    each time, where a part stays in a cache: one row takes 12 to 54 ms instead of 220, 128 rows 216 instead of 662.
    """
    k, n = w.shape
    block = group = k // w.num_groups
    if not widened_in_parts(w):
        wide = w.weight.reshape(-1, group, n).astype(x.dtype) * w.scales[:, None].astype(x.dtype)
        return jnp.matmul(x, wide.reshape(k, n), precision=HIGHEST)
    while block * n > WIDENED and block % 2 == 0:
        block //= 2

    def add(index, total):
        at = index * block
        own = jax.lax.dynamic_slice_in_dim(w.weight, at, block).astype(x.dtype)
        products = jnp.matmul(jax.lax.dynamic_slice_in_dim(x, at, block, axis=-1), own, precision=HIGHEST)
        return total + products * w.scales[at // group].astype(x.dtype)

    return jax.lax.fori_loop(0, k // block, add, jnp.zeros((*x.shape[:-1], n), x.dtype))
