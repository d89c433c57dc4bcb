"""Logits -> next ids, on the device, one setting per row.

Three samplers, picked by what any row of a batch asks for; none sorts the vocabulary unless it has to. Noise is keyed
by (seed, position), so a row draws the same token alone or in a batch.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Method = Literal["greedy", "gumbel", "filtered"]

MILD = 1e30  # temperatures that float32 logits can be divided by: beyond, and below its inverse, as at these
CANDIDATES = 1024  # the filtered sampler looks further only if these hold less than top_p


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each row draws its next token. Temperature 0 is exact greedy; top_k of V and top_p of 1 filter nothing."""

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]
    seed: Int[Array, " B"]

    @classmethod
    def rows(cls, count: int, vocab_size: int, *, temperature, top_p, top_k, seed) -> "Sampling":
        """numpy arrays of `count` rows; each value is one for all, or one a row. Raises ValueError naming the value."""

        def spread(name, value, dtype, valid, expected):
            array = np.asarray(value)
            if array.ndim and array.shape != (count,):
                raise ValueError(f"{name} has {array.size} values for {count} prompts")
            array = np.broadcast_to(array, (count,))
            if array.dtype.kind not in "iuf" or not np.all(valid(array)):
                raise ValueError(f"{name}={value!r}: expected {expected}")
            return array.astype(dtype)

        top_k = vocab_size if top_k is None else top_k
        degrees = spread("temperature", temperature, float, lambda t: (t >= 0) & np.isfinite(t), "a number from 0")
        return cls(
            np.where(degrees > 0, np.clip(degrees, 1 / MILD, MILD), 0).astype(np.float32),
            spread("top_p", top_p, np.float32, lambda p: (p > 0) & (p <= 1), "a number above 0, up to 1"),
            np.minimum(
                spread("top_k", top_k, np.int64, lambda k: (k >= 1) & (k % 1 == 0), "a whole number from 1"), vocab_size
            ).astype(np.int32),
            spread(
                "seed",
                seed,
                np.uint32,
                lambda s: (s >= 0) & (s < 2**32) & (s % 1 == 0),
                "a whole number from 0, below 2**32",
            ),
        )

    def method(self, vocab_size: int) -> Method:
        """The cheapest sampler that serves every row."""
        if not np.any(self.temperature):
            return "greedy"
        filtered = np.any(np.asarray(self.top_p) < 1) or np.any(np.asarray(self.top_k) < vocab_size)
        return "filtered" if filtered else "gumbel"


def choose(
    method: Method, logits: Float[Array, "B V"], positions: Int[Array, " B"], sampling: Sampling
) -> Int[Array, " B"]:
    """The token of each row, to stand at `positions`."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if method == "greedy":
        return greedy
    vocab = logits.shape[-1]
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(sampling.seed, positions)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(keys)
    tempered = logits / jnp.where(sampling.temperature == 0, 1, sampling.temperature)[:, None]
    if method == "gumbel":
        drawn = jnp.argmax(tempered + noise, axis=-1).astype(jnp.int32)
    else:
        drawn = _filtered(tempered, noise, sampling)
    return jnp.where(sampling.temperature == 0, greedy, drawn)


def _filtered(tempered: Float[Array, "B V"], noise: Float[Array, "B V"], sampling: Sampling) -> Int[Array, " B"]:
    vocab = tempered.shape[-1]
    total = jax.nn.logsumexp(tempered, axis=-1, keepdims=True)
    free = (sampling.top_p >= 1) & (sampling.top_k >= vocab)  # as if alone, with the sampler that does not filter
    unfiltered = jnp.argmax(tempered + noise, axis=-1)

    def among(count: int):
        """Draws among the `count` most probable tokens; also whether those suffice for every row."""
        values, ids = jax.lax.top_k(tempered, count)
        mass = jnp.cumsum(jnp.exp(values - total), axis=-1)
        before = jnp.concatenate([jnp.zeros_like(mass[:, :1]), mass[:, :-1]], axis=-1)
        kept = (before < sampling.top_p[:, None]) & (jnp.arange(count) < sampling.top_k[:, None])
        scores = jnp.where(kept, values + jnp.take_along_axis(noise, ids, axis=-1), -jnp.inf)
        drawn = jnp.take_along_axis(ids, jnp.argmax(scores, axis=-1)[:, None], axis=-1)[:, 0]
        enough = (mass[:, -1] >= sampling.top_p) | (sampling.top_k <= count) | (sampling.temperature == 0) | free
        return jnp.where(free, unfiltered, drawn), jnp.all(enough)

    if vocab <= CANDIDATES:
        return among(vocab)[0]
    drawn, enough = among(CANDIDATES)
    return jax.lax.cond(enough, lambda: drawn, lambda: among(vocab)[0])
