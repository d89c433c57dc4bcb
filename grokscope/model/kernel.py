"""Products with int8 weights on NVIDIA GPUs: one kernel, which reads int8 once and widens it on the way to the tensor
cores, for rows that go to different experts as for rows that all take one weight.

XLA alone copies weights of several scale groups as float32, and runs experts in a loop that asks the host what is next.
Rows of different experts lie in tiles; tiles of one expert run side by side, so that they share what they read.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

if TYPE_CHECKING:
    from grokscope.model.quant import QuantizedWeight

PROGRAMS = 2048  # of a product at least: 8 for each place on an H100, so that the last of them leave few empty
SHORTEST = 1024  # rows of a weight that a program adds up at least


@functools.cache
def available() -> bool:
    """Whether this process computes on cards that the kernel was written for: A100, H100, B200 and their kin."""
    device = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", "") in ("8.0", "9.0", "10.0", "10.3")


def tile_size(rows_each: int) -> int:
    """Rows of a tile, where a weight has so many on average."""
    return 16 if rows_each <= 8 else 64 if rows_each <= 64 else 128


class Tiles(NamedTuple):
    """The rows begin .. end of a tile and the weight that they take: int32 [N] each; idle ones end where they begin."""

    weights: jax.Array
    begins: jax.Array
    ends: jax.Array

    @classmethod
    def of(cls, begins: Int[Array, " E"], counts: Int[Array, " E"], tile: int, rows: int) -> "Tiles":
        """Of `rows` rows at most, sorted by weight: those of weight e are begins[e] .. + counts[e]."""
        some = min(len(counts), rows)
        numbers = jnp.arange(some + (rows - some) // tile)
        tiles = -(-counts // tile)
        behind = jnp.cumsum(tiles)
        weights = jnp.minimum(jnp.sum(numbers[:, None] >= behind, axis=1), len(counts) - 1)
        first = begins[weights] + (numbers - (behind - tiles)[weights]) * tile
        last = jnp.minimum(first + tile, (begins + counts)[weights])
        return cls(weights, first, jnp.where(numbers < behind[-1], last, first))


def products(
    x: Float[Array, "M K"], weights: Sequence["QuantizedWeight"], tiles: Tiles, tile: int
) -> Float[Array, "M N"]:
    """Each row times the weight of its tile, scaled and added up in float32; rows of no tile are left undefined."""
    (rows, k), n, groups = x.shape, weights[0].shape[1], weights[0].num_groups
    columns, depth = 128, 64
    blocks = pl.cdiv(n, columns)
    parts = _parts(k, groups, depth, len(tiles.begins) * blocks)
    stretches, length = max(groups // parts, 1), k // max(groups, parts)  # of one group each

    def run(numbers, begins, ends, x_ref, *refs):
        *weight_refs, out_ref = refs
        number, block, part = (pl.program_id(axis) for axis in range(3))
        begin, end = begins[number], ends[number]
        of_tile, of_block = pl.ds(begin, tile), pl.ds(block * columns, columns)
        own_rows = begin + jnp.arange(tile) < end
        own_columns = block * columns + jnp.arange(columns) < n

        def finish(weight_ref, scales_ref):
            def stretch(index):
                start = (part * stretches + index) * length

                def step(i, total):
                    at = pl.ds(start + i * depth, depth)
                    inside = i * depth + jnp.arange(depth) < length
                    some = _load(x_ref.at[of_tile, at], own_rows, None if length % depth == 0 else inside)
                    own = _load(
                        weight_ref.at[at, of_block],
                        None if length % depth == 0 else inside,
                        None if n % columns == 0 else own_columns,
                    )
                    return total + jnp.dot(some, own.astype(x.dtype), preferred_element_type=jnp.float32)

                total = lax.fori_loop(0, pl.cdiv(length, depth), step, jnp.zeros((tile, columns), jnp.float32))
                scales = _load(scales_ref.at[pl.ds(start // (k // groups), 1), of_block], None, own_columns)
                return total * scales.astype(jnp.float32)

            if stretches == 1:
                total = stretch(0)
            else:
                zeros = jnp.zeros((tile, columns), jnp.float32)
                total = lax.fori_loop(0, stretches, lambda i, total: total + stretch(i), zeros)
            own = own_rows[:, None] & own_columns[None]
            triton.store(out_ref.at[part, of_tile, of_block], total.astype(out_ref.dtype), mask=own)

        for e in range(len(weights)):  # one after the other: branches of a switch would each keep their own memory
            pl.when((numbers[number] == e) & (begin < end))(functools.partial(finish, *weight_refs[2 * e : 2 * e + 2]))

    warps, stages = 4, 4 if tile <= 64 else 3
    out = pl.pallas_call(
        run,
        grid=(len(tiles.begins), blocks, parts),
        out_shape=jax.ShapeDtypeStruct((parts, rows, n), x.dtype if parts == 1 else jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=jax.default_backend() == "cpu",
        name="int8_products",
    )(*tiles, x, *(a for w in weights for a in (w.weight, w.scales)))
    return out[0] if parts == 1 else out.sum(0).astype(x.dtype)


def _parts(k: int, groups: int, depth: int, programs: int) -> int:
    """Into how many parts the sums of a product are cut: each of whole groups, or a part of one."""
    parts = 1
    while parts * programs < PROGRAMS and k >= 2 * parts * SHORTEST:
        more = 2 * parts
        if groups % more and (more % groups or k % (more * depth)):
            break
        parts = more
    return parts


def _load(ref, rows, columns) -> Array:
    """A block, 0 where the masks say so; None is all."""
    if rows is None and columns is None:
        return triton.load(ref)
    masks = [m for m in (rows if rows is None else rows[:, None], columns if columns is None else columns[None]) if m is not None]
    mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), ref.shape)
    return triton.load(ref, mask=mask, other=0)
