"""Which machine a model fits: bytes on each device, for one mesh and for 1 to 64 devices.

Weights, cache and captures are arithmetic, the same as a run's. Temporaries are what the compiler says of one layer
over a block of a prompt, of one decode step, and of the head, compiled from shapes alone in a process with that many
virtual devices: the CPU compiler's, which expands int8 matrices that a GPU's need not. Nothing is loaded.
"""

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from grokscope import look
from grokscope.checkpoint.weights import described, device_bytes, stored_bytes
from grokscope.config import GrokConfig
from grokscope.model.params import GLOBAL_PARAMS, LAYER_PARAMS
from grokscope.model.sharding import make_mesh, meshes, on, placed
from grokscope.model.transformer import KVCache, Positions
from grokscope.run import captures, steps
from grokscope.run.compiled import keep_compiled
from grokscope.run.decode import batches, block_lengths, cache_length, num_rows, shapes
from grokscope.run.hooks import PLAIN, Given
from grokscope.run.plan import DISKS, priced
from grokscope.run.sampling import Sampling
from grokscope.run.staging import Hooks, Sequence
from grokscope.run.steps import DecodeState

CARDS = (24, 40, 48, 80, 96, 141, 192)  # GB: L4, A100-40, L40S, H100, RTX PRO 6000, H200, B200

USABLE = 0.92  # of a card: the rest is the driver's, and the allocator's gaps
DEVICES = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Fit:
    """Bytes on each device.

    cache: of the slots, and of the prompts that are being prefilled.
    temporaries: of one layer or the head, and the stream of those prompts.
    """

    mesh: str
    weights: int
    cache: int
    temporaries: int
    captures: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temporaries + self.captures

    @property
    def cards(self) -> list[int]:
        """GB of the cards that hold it."""
        return [size for size in CARDS if self.total <= USABLE * size * 1e9]


def fits(
    config: GrokConfig,
    asked: list[str],
    *,
    context: int,
    batch: int,
    capture=None,
    numerics: str = "bfloat16",
    form: str = "int8",
) -> list[Fit]:
    """For each mesh "DxM": `batch` prompts that fill `context` with what is made of them, captured as in `trace`.

    Raises ValueError for a mesh that does not fit, or a context longer than the model's; RuntimeError if the compiler
    fails.
    """
    if numerics not in ("float32", "bfloat16") or form not in ("int8", "expanded"):
        raise ValueError(
            f"numerics={numerics!r}, weights={form!r}: expected float32 or bfloat16, and int8 or expanded; what "
            "streaming takes stands below either"
        )
    if batch < 1:
        raise ValueError(f"batch={batch}: expected at least 1")
    if not 1 < context <= config.sequence_len:
        raise ValueError(f"context={context}: expected 2 to {config.sequence_len}, what the model holds")
    for mesh in asked:
        if not re.fullmatch(r"\d+x\d+", mesh) or mesh not in meshes(config, math.prod(_axes(mesh))):
            raise ValueError(f"mesh={mesh!r}: expected data x model, and a model axis that divides {config.ffn_size}")
    kept = captures.resolve(capture, config)  # before a minute of compiling
    temporaries = _compiled_apart(config, asked, context, batch, numerics, form)
    return [_fit(config, m, t, context, batch, kept, numerics, form) for m, t in zip(asked, temporaries, strict=True)]


def _fit(config, mesh: str, temporaries: int, context: int, batch: int, kept, numerics: str, form) -> Fit:
    devices = AbstractMesh(_axes(mesh), ("data", "model"))
    weights = stored_bytes(config, np.dtype(numerics), form, devices).whole(config)
    sequences, slots, length, rows = _shapes(context, batch, devices)
    caches = [  # of the slots, and of the prompts that are prefilled
        jax.ShapeDtypeStruct(shape, np.dtype(numerics), sharding=placed(devices, "BGSC", shape))
        for shape in (KVCache.sizes(config, slots, length), KVCache.sizes(config, rows, cache_length(context - 1)))
    ]
    positions = rows * sum(block_lengths(context - 1))
    stream = 2 * positions * config.emb_size * np.dtype(numerics).itemsize  # into a layer, and out
    stream += positions * 4 * (1 + config.key_size)  # and where it stands
    hooks = Hooks(config, kept, (), sequences)
    of_captures = priced(hooks, batch, numerics, devices, streamed=False).total["device"]
    cache = 2 * config.num_layers * device_bytes(caches)
    return Fit(mesh, weights, cache, temporaries + stream, of_captures)


def _shapes(context: int, batch: int, devices) -> tuple[list[Sequence], int, int, int]:
    """Prompts that fill the context but for a token; slots and cache length of decode; prompts prefilled together."""
    sequences = [Sequence(context - 1, 1)] * batch
    slots, length = shapes(sequences, batch, devices)
    return sequences, slots, length, num_rows(len(batches(sequences, slots)[0]))


def _axes(mesh: str) -> tuple[int, int]:
    data, model = map(int, mesh.split("x"))
    return data, model


# In a process of its own


def _compiled_apart(config: GrokConfig, asked: list[str], context: int, batch: int, numerics: str, form) -> list[int]:
    most = max(math.prod(_axes(mesh)) for mesh in asked)
    request = json.dumps([dataclasses.asdict(config), asked, context, batch, numerics, form])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(most)}
    done = subprocess.run(
        [sys.executable, "-m", "grokscope.run.fit"], input=request, capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"compiling for the plan failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def lowered(
    config: GrokConfig, devices: Mesh, context: int, batch: int, numerics: str, form
) -> dict[str, jax.stages.Lowered]:
    """A layer over a prompt's first block, a decode step's layer, and the two uses of the head, from shapes alone."""
    dtype = np.dtype(numerics)
    _, slots, length, prefilled = _shapes(context, batch, devices)

    def params(of) -> dict:
        found: dict[str, dict] = {}
        for param in of:
            found.setdefault(param.module, {})[param.name] = described(param, config, dtype, form, devices)
        return found

    def array(dims: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed(devices, dims, shape))

    def cache(rows: int, positions: int) -> KVCache:
        shape = KVCache.shape(config, rows, positions)
        one = array(KVCache.dims(shape), shape)
        return KVCache(one, one)

    def places(rows: int, length: int) -> Positions:
        made = jax.eval_shape(lambda: Positions.of(config, jnp.zeros(rows, jnp.int32), length))
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed(devices, "BTHC"[: a.ndim], a.shape)), made
        )

    tokens = np.zeros((prefilled, block_lengths(context - 1)[0]), np.int32)
    whole = NamedSharding(devices, PartitionSpec())
    as_whole = functools.partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole))
    state = as_whole(jax.eval_shape(lambda: DecodeState.idle(slots)))
    greedy = Sampling.rows(slots, config.vocab_size, temperature=0.0, top_p=1.0, top_k=None, seed=0)
    method, rows = greedy.method(config.vocab_size), as_whole(greedy)
    at = (places(*tokens.shape), tokens, np.ones(tokens.shape, bool), {}, Given())
    x, step = array("BTD", (*tokens.shape, config.emb_size)), array("BTD", (slots, 1, config.emb_size))
    layer, ends = params(LAYER_PARAMS), params(GLOBAL_PARAMS)
    with on(devices):
        return {
            "prompt": steps.layer.lower(config, PLAIN, layer, x, cache(prefilled, cache_length(context - 1)), *at),
            "step": steps.decode_layers.lower(
                config, PLAIN, [layer], step, [cache(slots, length)], places(slots, 1), state, [{}], [Given()], 0
            ),
            "score": steps.score.lower(config, PLAIN, ends, x, at[1], *at),
            "readout": steps.readout.lower(config, PLAIN, method, ends, step, state, rows, {}, Given(), 0),
        }


def temporaries(config: GrokConfig, mesh: str, context: int, batch: int, numerics: str, form) -> int:
    """The most that one of these needs beside its inputs."""
    ready = lowered(config, make_mesh(mesh, config), context, batch, numerics, form)
    analyses = [one.compile().memory_analysis() for one in ready.values()]
    return max(found.temp_size_in_bytes for found in analyses if found is not None)


# For people


def table(
    config: GrokConfig, mesh: str, *, context: int, batch: int, capture=None, numerics="bfloat16", form="int8"
) -> str:
    """What `grokscope plan --model` prints. Raises as `fits` does."""
    asked = [mesh, *(f"1x{n}" for n in DEVICES if f"1x{n}" != mesh and config.ffn_size % n == 0)]
    one, *others = fits(config, asked, context=context, batch=batch, capture=capture, numerics=numerics, form=form)
    lines = [f"mesh {mesh}, {numerics}, {form} weights, context {context}, batch {batch}: bytes on each device"]
    for name in ("weights", "cache", "temporaries", "captures", "total"):
        note = "  (the CPU compiler's, of one layer or the head; and the stream)" if name == "temporaries" else ""
        lines.append(f"  {name:12}{look.si(getattr(one, name), 'B'):>10}{note}")
    lines += [f"  cards of {_sizes(one)}", "", f"{'devices':>7} {'mesh':>6} {'each':>10}  cards that hold it"]
    for fit in sorted([one, *others], key=lambda f: (math.prod(_axes(f.mesh)), f.mesh)):
        lines.append(f"{math.prod(_axes(fit.mesh)):7} {fit.mesh:>6} {look.si(fit.total, 'B'):>10}  {_sizes(fit)}")
    return "\n".join([*lines, "", *_streamed(config, numerics, form)])


def _sizes(fit: Fit) -> str:
    return ", ".join(f"{size} GB" for size in fit.cards) or "none"


def _streamed(config: GrokConfig, numerics: str, form) -> list[str]:
    own = stored_bytes(config, np.dtype(numerics), form)
    disk = stored_bytes(config, np.dtype(np.float32), "int8")
    read = disk.whole(config) - disk.ends
    token = config.num_layers * (disk.attention + config.num_selected_experts * disk.expert)

    def at_speeds(count: int) -> str:
        return ", ".join(f"{count / speed / 1e9:,.1f} s at {speed} GB/s" for speed in DISKS)

    return [
        f'streamed (weights="streamed"): {look.si(own.least, "B")} for weights at least',
        f"a pass over many prompts reads {look.si(read, 'B')}: {at_speeds(read)}",
        f"each token made after it {look.si(token, 'B')}: {at_speeds(token)}",
        "(reading alone; on a CPU computing may take longer)",
    ]


if __name__ == "__main__":
    keep_compiled()
    values, asked, *rest = json.loads(sys.stdin.read())
    shape = GrokConfig(**values)
    print(json.dumps([temporaries(shape, mesh, *rest) for mesh in asked]))
