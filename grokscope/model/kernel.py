"""Products with int8 weights on NVIDIA GPUs: one kernel, which reads int8 once and widens it on the way to the tensor
cores, for rows that go to different experts as for rows that all take one weight.

XLA alone copies weights of several scale groups as float32, and runs experts in a loop that asks the host what is next.
Rows of different experts lie in tiles; tiles of one expert run side by side, so that they share what they read.

It is written for Pallas's Triton backend, which jax 0.11 deprecates and this project's jax (below 0.12) has.
"""

import functools
import itertools
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

TINY = 1e-20  # in place of smaller scales, which nothing can be divided by
STACKED = 1 << 31  # values: a stack has fewer, as Pallas counts them in 32 bits
NEAR = 3 << 22  # bytes of rows that tiles running side by side read together: a quarter of an H100's last cache


class Shape(NamedTuple):
    """How one program multiplies. The best of those that were tried on an H100 (benchmarks/LOG.md)."""

    columns: int  # of a weight, of one program
    depth: int  # rows of a weight that are widened at a time
    stages: int  # of them that are read ahead
    programs: int  # at least: sums are cut into parts where there are fewer
    shortest: int  # rows of a weight that a part adds up at least


SHAPES = {
    16: Shape(columns=256, depth=32, stages=5, programs=1024, shortest=256),
    64: Shape(columns=128, depth=128, stages=3, programs=1024, shortest=512),
    128: Shape(columns=128, depth=64, stages=3, programs=512, shortest=1024),
}


@functools.cache
def available() -> bool:
    """Whether this process computes on cards that the kernel was written for: A100, H100, B200 and their kin."""
    device = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", "") in ("8.0", "9.0", "10.0", "10.3")


def tile_size(rows_each: int) -> int:
    """Rows of a tile, where a weight has so many on average."""
    return 16 if rows_each <= 8 else 64 if rows_each <= 64 else 128


class Tiles(NamedTuple):
    """The rows begin .. end of a tile and the weight that they take, int32 [N] each; of an idle one end <= begin."""

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
        return cls(weights, first, last)


class Cut(NamedTuple):
    """How a product of [rows, K] and [K, N] is cut into programs."""

    shape: Shape
    rows: int
    n: int
    group: int  # rows of a weight that share scales
    num_tiles: int
    near: int  # tiles that run side by side and read the same columns
    parts: int  # that a sum is cut into
    stretches: int  # of a part, each of one group
    length: int  # of a stretch
    sizes: tuple[int, ...]  # a tile multiplies the least of these that holds its rows

    @classmethod
    def of(cls, tile: int, num_tiles: int, rows: int, stacks: Sequence["QuantizedWeight"]) -> "Cut":
        shape, (_, k, n), groups = SHAPES[tile], stacks[0].shape, stacks[0].num_groups
        num_weights = sum(len(stack.weight) for stack in stacks)
        near = min(max(NEAR // (2 * tile * k), 1), num_tiles)
        parts = _parts(k, groups, num_tiles * pl.cdiv(n, shape.columns), shape)
        # Where experts have few tiles the last ones, often not half full, are much of all; else two sizes are slower.
        halves = tile == 128 and num_weights > 1 and rows < 512 * num_weights
        sizes = (tile // 2, tile) if halves else (tile,)
        stretches, length = max(groups // parts, 1), k // max(groups, parts)
        return cls(shape, rows, n, k // groups, num_tiles, near, parts, stretches, length, sizes)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.near, pl.cdiv(self.n, self.shape.columns), pl.cdiv(self.num_tiles, self.near) * self.parts


class Place(NamedTuple):
    """What a program is for: a weight of its stack, rows begin .. end, columns from `first` on, a part of the sum."""

    number: jax.Array
    begin: jax.Array
    end: jax.Array
    first: jax.Array
    part: jax.Array


def products(
    x: Float[Array, "M K"], stacks: Sequence["QuantizedWeight"], tiles: Tiles, tile: int
) -> Float[Array, "M N"]:
    """Each row times the weight of its tile, scaled and added up in float32, in the type of x.

    Args:
      x: bfloat16.
      stacks: the weights in order, [some, K, N] each, alike in groups, of less than STACKED values. Each is compiled
        for, so that many weights are best one stack.
      tiles: of no more than `tile` rows each, 16, 64 or 128.

    Returns:
      Rows of no tile are undefined.
    """
    cut = Cut.of(tile, len(tiles.begins), len(x), stacks)
    out = pl.pallas_call(
        functools.partial(_program, cut),
        grid=cut.grid,
        out_shape=jax.ShapeDtypeStruct((cut.parts, cut.rows, cut.n), x.dtype if cut.parts == 1 else jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=cut.shape.stages),
        interpret=jax.default_backend() == "cpu",
        name="int8_products",
    )(*tiles, x, *(a for stack in stacks for a in (stack.weight, stack.scales)))
    return out[0] if cut.parts == 1 else out.sum(0).astype(x.dtype)


def _program(cut: Cut, owners, begins, ends, x, *refs) -> None:
    """One tile's rows times some columns of its weight; refs: weights and scales of each stack, and the output."""
    *stacks, out = refs
    tile = pl.program_id(2) // cut.parts * cut.near + pl.program_id(0)
    here = tile < cut.num_tiles
    tile = jnp.minimum(tile, cut.num_tiles - 1)
    number, begin, end = owners[tile], begins[tile], ends[tile]
    first, part = pl.program_id(1) * cut.shape.columns, pl.program_id(2) % cut.parts
    for weights, scales in zip(stacks[::2], stacks[1::2], strict=True):  # a switch would keep memory for each branch
        count = weights.shape[0]
        within = here & (number >= 0) & (number < count)
        for smaller, size in itertools.pairwise((0, *cut.sizes)):
            own = within & (smaller < end - begin) & (end - begin <= size)
            place = Place(number, begin, end, first, part)
            pl.when(own)(functools.partial(_multiply, cut, size, place, x, weights, scales, out))
        number = number - count


def _multiply(cut: Cut, size: int, place: Place, x, weights, scales, out) -> None:
    number, begin, end, first, part = place
    of_block, own_columns = pl.ds(first, cut.shape.columns), _inside(first, cut.shape.columns, cut.n)
    start = jnp.minimum(begin, max(cut.rows - size, 0))  # others' rows are read too: faster than masking them
    of_tile, numbers = pl.ds(start, size), start + jnp.arange(size)
    there = None if cut.rows >= size else numbers < cut.rows

    def scales_of(index):
        group = (part * cut.stretches + index) * cut.length // cut.group
        found = _load(scales.at[number, pl.ds(group, 1), of_block], None, own_columns).astype(jnp.float32)
        return jnp.where(jnp.abs(found) < TINY, TINY, found)

    def stretch(index, total):
        def step(i, total):
            at = pl.ds((part * cut.stretches + index) * cut.length + i * cut.shape.depth, cut.shape.depth)
            own = _inside(i * cut.shape.depth, cut.shape.depth, cut.length)
            some = _load(x.at[of_tile, at], there, own)
            wide = _load(weights.at[number, at, of_block], own, own_columns).astype(x.dtype)
            return total + jnp.dot(some, wide, preferred_element_type=jnp.float32)

        return lax.fori_loop(0, pl.cdiv(cut.length, cut.shape.depth), step, total)

    # In units of the group at hand: a sum for each group and one of all do not fit into the registers.
    def in_units(index, total):
        return stretch(index, total * (scales_of(jnp.maximum(index - 1, 0)) / scales_of(index)))

    total = jnp.zeros((size, cut.shape.columns), jnp.float32)
    total = lax.fori_loop(0, cut.stretches, in_units, total) if cut.stretches > 1 else stretch(0, total)
    total = total * scales_of(cut.stretches - 1)
    mask = _mask((begin <= numbers) & (numbers < end), own_columns, total.shape)
    triton.store(out.at[part, of_tile, of_block], total.astype(out.dtype), mask=mask)


def _parts(k: int, groups: int, programs: int, shape: Shape) -> int:
    """Into how many parts the sums of a product are cut: each of whole groups, or a part of one."""
    parts = 1
    while parts * programs < shape.programs and k >= 2 * parts * shape.shortest:
        more = 2 * parts
        if groups % more and (more % groups or k % (more * shape.depth)):
            break
        parts = more
    return parts


def _inside(first, size: int, whole: int) -> Array | None:
    """Which of first .. + size lie within the whole; None if all do, wherever it is cut."""
    return None if whole % size == 0 else first + jnp.arange(size) < whole


def _mask(rows: Array | None, columns: Array | None, shape: tuple[int, ...]) -> Array | None:
    """Which of a block is meant; None is all."""
    masks = [m[at] for m, at in ((rows, (slice(None), None)), (columns, (None,))) if m is not None]
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), shape) if masks else None


def _load(ref, rows: Array | None, columns: Array | None) -> Array:
    """A block, 0 where it is not meant."""
    mask = _mask(rows, columns, ref.shape)
    return triton.load(ref) if mask is None else triton.load(ref, mask=mask, other=0)
