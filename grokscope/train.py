"""A small training loop for the architecture: makes grok-1-mini, continues or fine-tunes any checkpoint of the format.

Data is a folder of token ids (grokscope/corpus.py). A batch is a function of seed and step, and the whole state is
saved, so a run that was killed resumes exactly (a GPU adds up in no fixed order: there within rounding). Master weights
are float32; the result is written in the released format, int8. Every expert runs exactly the tokens routed to it:
nothing is dropped, there is no capacity.

On a mesh, parameters and optimizer state lie by the letter table and each data shard computes its rows of the batch;
one process drives all devices. The state file holds whole arrays, so that a run begun on one mesh goes on on another.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from grokscope.checkpoint import ckpt0, weights
from grokscope.checkpoint.lock import lock
from grokscope.config import GrokConfig
from grokscope.corpus import TokenData
from grokscope.model import sharding, transformer
from grokscope.model.params import PARAMS
from grokscope.model.transformer import Positions
from grokscope.run import engine
from grokscope.run.compiled import keep_compiled
from grokscope.run.decode import deferred_interrupt
from grokscope.tokenizer import Tokenizer

MATRICES = {(p.module, p.name) for p in PARAMS if p.groups is not None}
EMBEDDING = ("embedding", "w")
DIMS = {(p.module, p.name): ("L",) * p.layered + p.dims[p.dims[0] == "E" :] for p in PARAMS}
"""(Haiku module, weight) -> dims of the leaf that the loop holds: layers stacked, experts listed."""
KEPT = ("attn_z", "expert_hidden", "expert_out")
"""Taps whose values each layer keeps, beside its input, for the derivative. The rest, mostly attention, is computed
again there: faster on CPU than writing and reading it, in 0.15 to 0.28 of the memory (`benchmarks/LOG.md`).
"""


FINE_TUNING = 1e-4
"""Learning rate from a checkpoint. 200 steps of grok-1-mini on Python, one of its ten domains, gained 0.035 nats a
held-out token there, and cost 0.03 on all; at 3e-4 0.04 and 0.11, at 1e-3 0.01 and 0.48; at 3e-3 Python lost 0.15 too.
"""
SAVE_SECONDS = 300  # at most between two states on disk, or twenty times what saving one takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Learning rate: linear warm-up, constant, linear decay to zero over the last part, `decay`.

    The rate is one for training from scratch; FINE_TUNING is one for a checkpoint that is trained already.

    The batch goes in `accumulate` parts, one after the other, whose gradients are averaged before one update: the same
    as the whole for nats and router_z, in a part's memory; load_balance is that of each part, whose shares are uneven.
    """

    steps: int
    batch: int = 16
    sequence_len: int = 256
    learning_rate: float = 3e-3
    warmup: int = 100
    decay: float = 0.4
    weight_decay: float = 0.1
    load_balance: float = 0.01
    router_z: float = 1e-3
    seed: int = 0
    accumulate: int = 1

    def __post_init__(self):
        for name in ("steps", "batch", "sequence_len", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate}: expected a number above 0")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed}: expected a whole number from 0, below 2**32")
        if self.batch % self.accumulate:
            raise ValueError(f"batch={self.batch}: expected a multiple of accumulate={self.accumulate}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay}: expected a share of the steps, 0 to 1")

    def schedule(self) -> optax.Schedule:
        hold = self.steps - int(self.decay * self.steps)
        warmup = min(self.warmup, hold)
        return optax.join_schedules(
            [
                optax.linear_schedule(self.learning_rate / max(warmup, 1), self.learning_rate, warmup),
                optax.constant_schedule(self.learning_rate),
                optax.linear_schedule(self.learning_rate, 0.0, self.steps - hold),
            ],
            [warmup, hold],
        )


def losses(config: GrokConfig, params: dict, tokens: jax.Array, dtype) -> dict[str, jax.Array]:
    """Of a batch [B, T + 1]: "nats" [B, T] per predicted token, "load_balance" (E * sum of share * probability, 1
    when even), "router_z" (mean squared log-sum-exp of router logits), "share" [L, E] (each expert's part)."""
    params, master = _cast(params, dtype), params
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = Positions.of(config, jnp.zeros(len(tokens), jnp.int32), inputs.shape[1])
    live = jnp.ones(inputs.shape, bool)

    def step(x, layer_params):
        x, _, routed = transformer.layer(config, layer_params, x, None, positions, live)
        share = jnp.mean(jax.nn.one_hot(routed.chosen, config.num_experts), axis=(0, 1, 2))
        probability = jnp.mean(jax.nn.softmax(routed.logits), axis=(0, 1))
        balance = config.num_experts * jnp.sum(share * probability)
        return x, (balance, jnp.mean(jax.nn.logsumexp(routed.logits, axis=-1) ** 2), share)

    step = jax.checkpoint(step, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(*KEPT))
    # From float32: what many places add to one row is lost in bfloat16, and took two thirds of a step on an H100.
    x = transformer.embed(config, master["ends"], inputs).astype(dtype)
    x, (balance, router_z, share) = jax.lax.scan(step, x, params["layers"])
    nats = -transformer.next_logprobs(config, master["ends"], x, targets)  # parts add up its derivative in float32
    return {"nats": nats, "load_balance": balance.mean(), "router_z": router_z.mean(), "share": share}


def _cast(params: dict, dtype) -> dict:
    def cast(path, leaf):
        return leaf.astype(dtype) if _name(path) in MATRICES | {EMBEDDING} else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _name(path) -> tuple[str, str]:
    """(Haiku module, weight) of a leaf in {"ends": {module: {name: ...}}, "layers": ...}."""
    return path[1].key, path[2].key


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW with clipping; norms and router are not decayed."""

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) in MATRICES | {EMBEDDING}, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(recipe.schedule(), b1=0.9, b2=0.95, weight_decay=recipe.weight_decay, mask=decayed),
    )


def layout(config: GrokConfig, mesh: Mesh | AbstractMesh, tree):
    """Where each leaf of parameters, gradients or optimizer state lies, by the letter table; counts lie everywhere."""

    def lies(path, _) -> NamedSharding:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        dims = DIMS.get(tuple(keys[-2:]), ())
        return NamedSharding(mesh, sharding.spec(dims, [config.dims[d[0]] for d in dims], dict(mesh.shape)))

    return jax.tree_util.tree_map_with_path(lies, tree)


def _laid_out(config: GrokConfig, tree):
    """The tree, in a trace, laid out on the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, layout(config, mesh, tree))


def _put(config: GrokConfig, mesh: Mesh | None, tree):
    """Arrays of the host or of any devices, laid out on a mesh; None is the default device."""
    return jax.device_put(tree, None if mesh is None else layout(config, mesh, tree))


def gradients(config: GrokConfig, recipe: Recipe, dtype: str, params: dict, tokens: jax.Array) -> tuple[dict, dict]:
    """Of a batch [B, T + 1]: float32 gradients, and the losses with nats averaged; means over the recipe's parts."""

    def loss(params, tokens):
        parts = losses(config, params, tokens, dtype)
        nats = parts["nats"].mean()
        total = nats + recipe.load_balance * parts["load_balance"] + recipe.router_z * parts["router_z"]
        return total, {**parts, "nats": nats}

    of_part = jax.grad(loss, has_aux=True)
    if recipe.accumulate == 1:
        return of_part(params, sharding.constrain(tokens, "BT"))

    def add(total, part):
        grads, parts = jax.tree.map(jnp.add, total, of_part(params, part))
        return (_laid_out(config, grads), parts), None

    tokens = sharding.constrain(tokens.reshape(recipe.accumulate, -1, tokens.shape[1]), "ABT")
    none = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, params, tokens[0]))
    total, _ = jax.lax.scan(add, none, tokens)
    return jax.tree.map(lambda leaf: leaf / recipe.accumulate, total)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3,))
def train_step(config: GrokConfig, recipe: Recipe, dtype: str, state: dict, tokens: jax.Array) -> tuple[dict, dict]:
    """One update, with a batch [B, T + 1]. Returns the new state and the losses of the batch before it."""
    grads, parts = gradients(config, recipe, dtype, state["params"], tokens)
    updates, opt = optimizer(recipe).update(_laid_out(config, grads), state["opt"], state["params"])
    return _laid_out(config, {"params": optax.apply_updates(state["params"], updates), "opt": opt}), parts


_evaluate_batch = jax.jit(losses, static_argnums=(0, 3))


def evaluate(
    config: GrokConfig, params: dict, data: TokenData, *, dtype: str, length: int = 256, windows: int = 48
) -> dict:
    """{domain: {"nats": per token, "bits_per_byte": ..., "share": [L, E]}} and the "mixture" of nats and bits, weighted
    as in training; over fixed windows of `length` tokens, a multiple of 12."""
    found = {}
    for domain in data.weights:
        tokens = data.windows(domain, length, windows)
        parts = [_evaluate_batch(config, params, batch, dtype) for batch in np.split(tokens, windows // 12)]
        nats = float(np.mean([p["nats"] for p in parts]))
        share = np.mean([p["share"] for p in parts], axis=0)
        found[domain] = {
            "nats": nats,
            "bits_per_byte": nats / math.log(2) / data.bytes_per_token[domain],
            "share": share,
        }
    total = sum(data.weights.values())
    found["mixture"] = {
        key: sum(data.weights[d] * found[d][key] for d in data.weights) / total for key in ("nats", "bits_per_byte")
    }
    return found


def stack(ends: transformer.Params, layers: list[transformer.Params]) -> dict:
    """Parameters as the training loop holds them: layers stacked along a leading axis."""
    return {"ends": ends, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def fresh_params(config: GrokConfig, seed: int) -> dict:
    ends, layers = transformer.initial_params(config, jax.random.key(seed))

    def listed(params):
        experts = {n: transformer.ExpertList(tuple(w)) for n, w in params["layer/experts"].items()}
        return {**params, "layer/experts": experts}

    return stack(ends, [listed(p) for p in layers])


def checkpoint_params(checkpoint: ckpt0.Checkpoint, mesh: Mesh | None = None) -> dict:
    """Float32 parameters of a checkpoint, dequantised; on a mesh each device reads its part."""
    loaded = weights.load(weights.Reader(checkpoint, np.dtype(np.float32), "expanded", mesh))
    return _put(checkpoint.config, mesh, stack(loaded.ends, loaded.layers))


def evaluate_checkpoint(
    directory: Path, data: Path | str, *, length: int = 256, windows: int = 48, mesh: str | None = None
) -> dict:
    """`evaluate` of a checkpoint on disk, as it was stored, over the held-out windows of `data`."""
    keep_compiled()
    checkpoint = ckpt0.open_checkpoint(directory)
    config = checkpoint.config
    held_out = TokenData(data, "valid", config.vocab_size)
    held_out.refuse_shorter(length)
    devices = None if mesh is None else sharding.make_mesh(mesh, config)
    with sharding.on(devices):
        params = checkpoint_params(checkpoint, devices)
        return evaluate(config, params, held_out, dtype="float32", length=length, windows=windows)


def export(directory: Path, config: GrokConfig, params: dict, tokenizer: Path | None) -> Path:
    """Writes parameters in the released format; the embedding is rounded to bfloat16 values."""
    host = jax.tree.map(np.asarray, params)

    def weight(slot: ckpt0.Slot) -> np.ndarray:
        value = host["ends" if slot.layer is None else "layers"][slot.param.module][slot.param.name]
        if slot.layer is None:
            return value.astype(ml_dtypes.bfloat16).astype(np.float32) if slot.param.name == "w" else value
        if isinstance(value, transformer.ExpertList):
            return np.stack([w[slot.layer] for w in value.experts])
        return value[slot.layer]

    return ckpt0.write(directory, config, weight, tokenizer)


DIVERGED = (
    "the run diverged. The last state that was saved is from before; a lower learning rate (and a new --out) may not"
)


def save_state(path: Path, step: int, state: dict) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in leaves}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise RuntimeError(f"parameters are not finite behind step {step}: {DIVERGED}")
    partial = path.with_name(path.name + ".partial")
    partial.touch()  # save_file alone lets nobody else read it
    mode = partial.stat().st_mode
    try:
        save_file({**arrays, "step": np.array(step)}, partial)
    except SafetensorError as err:
        raise OSError(f"{partial} cannot be written: {err}") from err
    partial.chmod(mode)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_state(path: Path, like: dict) -> tuple[int, dict]:
    """Step and state, on the host; raises ValueError if it belongs to another configuration than `like`."""
    try:
        arrays = load_file(path)
    except SafetensorError as err:
        raise ValueError(f"{path} is damaged ({err}); choose a new --out, or delete it to begin again") from err
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(p) for p, _ in paths]
    shapes = {"step": ((), None)} | {n: (leaf.shape, leaf.dtype) for n, (_, leaf) in zip(names, paths, strict=True)}
    wrong = [
        n
        for n, (shape, dtype) in shapes.items()
        if n not in arrays or arrays[n].shape != shape or dtype not in (None, arrays[n].dtype)
    ]
    if wrong:
        raise ValueError(
            f"{path} belongs to another model: {wrong[0]} is missing, or has another shape or type; choose a new --out"
        )
    return int(arrays["step"]), jax.tree_util.tree_unflatten(treedef, [arrays[n] for n in names])


def train(
    data: Path | str,
    out: Path | str,
    recipe: Recipe,
    *,
    start: ckpt0.Checkpoint | GrokConfig,
    tokenizer: Path | None = None,
    mesh: str | None = None,
    save_every: int = 500,
    report: Callable[[dict], None] = lambda row: None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Path:
    """Trains and writes `out/checkpoint`; `out/state.safetensors` lets the same call resume exactly.

    The state is saved every `save_every` steps, every five minutes (or twenty times what saving takes) and on Ctrl-C,
    behind which KeyboardInterrupt is raised. `mesh` is "DxM", data x model; None is one device. A run may resume on
    another mesh: the same but for rounding. `report` gets a row every 50 steps (step, nats, load_balance, router_z,
    least and greatest expert share, tokens per second), also appended to `out/log.jsonl`. Raises FileExistsError if
    `out/checkpoint` exists, ValueError if `out` was begun with something else or if model, tokenizer, data, mesh and
    recipe do not fit one another, OSError where there is no room, and RuntimeError where another process trains in
    `out`, or loss or parameters are not finite any more.
    """
    keep_compiled()
    out = Path(out)
    if (out / "checkpoint" / "config.json").exists():
        raise FileExistsError(f"{out}/checkpoint exists: this run is finished; choose a new --out")
    ckpt0.refuse_contents(out / "checkpoint")
    config, own = (start, None) if isinstance(start, GrokConfig) else (start.config, start.tokenizer)
    devices = _devices(config, recipe, mesh)
    with contextlib.ExitStack() as held, sharding.on(devices), deferred_interrupt() as interrupted:
        ids = _training_ids(data, recipe, config, tokenizer)
        _require_room(out, config)
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(out))
        begun = _begun(recipe, start, ids)
        _same_run(out, begun)
        first, state = _first_state(out, recipe, start, devices)
        if interrupted.is_set():
            raise KeyboardInterrupt
        log, saved = _Log(out / "log.jsonl", recipe, first, report), _Saved(out / "state.safetensors")
        before = None
        for step in progress(range(first, recipe.steps)):
            tokens = _batch(ids, recipe, step, devices)
            state, parts = train_step(config, recipe, begun["dtype"], state, tokens)
            jax.block_until_ready(before)  # at most one step is not done yet, or progress would be ahead
            before = parts
            log(step + 1, parts)
            if (step + 1) % save_every == 0 or saved.long_ago or interrupted.is_set():
                saved(step + 1, state)
            if interrupted.is_set():
                raise KeyboardInterrupt
        saved(recipe.steps, state)
        if interrupted.is_set():
            raise KeyboardInterrupt
    return export(out / "checkpoint", config, state["params"], tokenizer or own)


def _training_ids(data: Path | str, recipe: Recipe, config: GrokConfig, tokenizer: Path | None) -> TokenData:
    """The ids to train on. Faults of the held-out ones and of the tokenizer show now too, not after hours."""
    ids = TokenData(data, "train", config.vocab_size)
    for split in (ids, TokenData(data, "valid", config.vocab_size)):
        split.refuse_shorter(recipe.sequence_len)
    if tokenizer is not None:
        Tokenizer(tokenizer, config.vocab_size)
    return ids


class _Saved:
    """Saves the state, and knows when that is due."""

    def __init__(self, path: Path):
        self.path, self.clock, self.took = path, time.perf_counter(), 0.0

    @property
    def long_ago(self) -> bool:
        return time.perf_counter() - self.clock > max(SAVE_SECONDS, 20 * self.took)

    def __call__(self, step: int, state: dict) -> None:
        begun = time.perf_counter()
        save_state(self.path, step, state)
        self.clock = time.perf_counter()
        self.took = self.clock - begun


def _refuse_diverged(step: int, parts: dict) -> None:
    nats = float(parts["nats"])
    if not math.isfinite(nats):
        raise RuntimeError(f"the loss is {nats} at step {step}: {DIVERGED}")


def _require_room(out: Path, config: GrokConfig) -> None:
    """For the state, float32 parameters and two moments: twice while it is replaced, or once and the checkpoint."""
    state = out / "state.safetensors"
    present, whole = state.stat().st_size if state.exists() else 0, 12 * config.num_parameters
    ckpt0.require_room(out, whole + max(whole, ckpt0.payload_bytes(config)), present)


def _devices(config: GrokConfig, recipe: Recipe, mesh: str | None) -> Mesh | None:
    """The mesh of that name; raises ValueError where the recipe fits neither it nor the model."""
    if recipe.sequence_len > config.sequence_len:
        raise ValueError(f"sequence_len={recipe.sequence_len} exceeds the context of the model, {config.sequence_len}")
    if mesh is None:
        return None
    devices = sharding.make_mesh(mesh, config)
    if recipe.batch % (recipe.accumulate * devices.shape["data"]):
        raise ValueError(
            f"batch={recipe.batch} on mesh={mesh!r}: expected a multiple of accumulate times the data axis, "
            f"{recipe.accumulate} * {devices.shape['data']}"
        )
    return devices


def _first_state(
    out: Path, recipe: Recipe, start: ckpt0.Checkpoint | GrokConfig, mesh: Mesh | None
) -> tuple[int, dict]:
    """The step to go on from and the state there: as saved in `out`, or fresh."""
    config = start if isinstance(start, GrokConfig) else start.config

    def begin(params: dict) -> dict:
        return {"params": params, "opt": optimizer(recipe).init(params)}

    if (out / "state.safetensors").exists():
        like = jax.eval_shape(lambda: begin(fresh_params(config, recipe.seed)))
        step, state = load_state(out / "state.safetensors", like)
        if step > recipe.steps:
            raise ValueError(f"{out} holds the state behind step {step}, and the recipe has {recipe.steps} steps")
        return step, _put(config, mesh, state)
    if isinstance(start, GrokConfig):
        return 0, _put(config, mesh, begin(_put(config, mesh, fresh_params(config, recipe.seed))))
    return 0, _put(config, mesh, begin(checkpoint_params(start, mesh)))


def _batch(ids: TokenData, recipe: Recipe, step: int, mesh: Mesh | None) -> np.ndarray | jax.Array:
    """Tokens [B, T + 1] of a step, each row on its data shard."""
    tokens = ids.batch(recipe.seed, step, recipe.batch, recipe.sequence_len)
    return tokens if mesh is None else jax.device_put(tokens, sharding.placed(mesh, "BT", tokens.shape))


def _begun(recipe: Recipe, start: ckpt0.Checkpoint | GrokConfig, ids: TokenData) -> dict:
    """What decides a run, but for rounding: recipe.json."""
    scratch = isinstance(start, GrokConfig)
    return {
        "recipe": dataclasses.asdict(recipe),
        "config": dataclasses.asdict(start if scratch else start.config),
        "start": "scratch" if scratch else start.hash(),
        "data": {d: [share, len(ids.ids[d]), zlib.crc32(ids.ids[d])] for d, share in ids.weights.items()},
        "dtype": engine.default_numerics(),
    }


def _same_run(out: Path, begun: dict) -> None:
    """Notes what a run began with, or raises ValueError if the state in `out` began with something else."""
    path = out / "recipe.json"
    if not path.exists() or not (out / "state.safetensors").exists():
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(begun, indent=1))
        partial.replace(path)
    try:
        before = json.loads(path.read_text("utf-8"))
        before["recipe"] = dataclasses.asdict(Recipe(**before["recipe"]))  # an older one has fewer settings
        for domain, facts in before.get("data", {}).items():  # and no checksum of the ids
            facts += begun["data"].get(domain, [])[len(facts) :]
    except (ValueError, TypeError, KeyError) as err:
        raise ValueError(f"{path} is damaged ({err}); delete it to go on with {out} all the same") from err
    changed = [name for name in begun if before.get(name) != begun[name]]
    if "data" not in changed and [*before["data"]] != [*begun["data"]]:  # batches are drawn from them in turn
        changed.append("order of its data")
    if changed:
        there, now = before["recipe"], begun["recipe"]
        settings = [f"{name} {there[name]}, now {now[name]}" for name in now if there[name] != now[name]]
        raise ValueError(
            f"{out} was begun with another {' and '.join(changed)}"
            + (f" ({'; '.join(settings)})" if settings else "")
            + f"; {path} says with what. Go on with that, or choose a new --out"
        )


class _Log:
    """Writes and reports a row every 50 steps and at the last. Rows behind the first step are of what is made again."""

    def __init__(self, path: Path, recipe: Recipe, first: int, report: Callable[[dict], None]):
        self.path, self.recipe, self.report = path, recipe, report
        self.step, self.clock = first, time.perf_counter()  # of the row before
        rows = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        partial = path.with_name(path.name + ".partial")
        try:
            kept = [row for row in rows if row.endswith("}\n") and json.loads(row)["step"] <= first]
        except (ValueError, KeyError) as err:
            raise ValueError(f"{path} is damaged ({err}); move it away to go on, the state is whole") from err
        partial.write_text("".join(kept))
        partial.replace(path)

    def __call__(self, step: int, parts: dict) -> None:
        if step % 50 and step != self.recipe.steps:
            return
        _refuse_diverged(step, parts)
        row = self.row(step, parts)
        with self.path.open("a") as log:
            log.write(json.dumps(row) + "\n")
        self.report(row)

    def row(self, step: int, parts: dict) -> dict:
        share = np.asarray(parts["share"])  # waits for the step
        tokens = (step - self.step) * self.recipe.batch * self.recipe.sequence_len
        rate, self.step, self.clock = tokens / (time.perf_counter() - self.clock), step, time.perf_counter()
        return {
            "step": step,
            **{name: round(float(parts[name]), 4) for name in ("nats", "load_balance", "router_z")},
            "share_min": round(float(share.min()), 3),
            "share_max": round(float(share.max()), 3),
            "tokens_per_second": round(rate),
        }
