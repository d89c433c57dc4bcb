"""Where a layer's weights come from: resident on the devices, or streamed from disk while the model runs.

Either way matrices are expanded to the compute type or kept as int8 with scales. Expansion is numpy's work, in the
threads that read, part by part: each process reads only the bytes of its devices' parts from the memory-mapped files.
"""

import dataclasses
import functools
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from grokscope.checkpoint.ckpt0 import Checkpoint, Slot, slots
from grokscope.checkpoint.tensorfile import Tensor, TensorFileError
from grokscope.config import GrokConfig
from grokscope.model import kernel
from grokscope.model.params import GLOBAL_PARAMS, LAYER_PARAMS, Param
from grokscope.model.quant import QuantizedWeight, Weight, dequantize
from grokscope.model.sharding import parts, placed
from grokscope.model.transformer import ExpertList, Params

Form = Literal["expanded", "int8"]

READERS = 4  # tensors under way at a time while resident weights are loaded
PIECE = 1 << 25  # bytes that resident weights are cut from
EXPERTS = "layer/experts"
EXPANDED = 1 << 26  # bytes: about what a processor's caches hold


class Pages:
    """Memory that XLA on CPU takes as it is: aligned to 64 bytes, or it copies. Cut from pieces of `piece` bytes, which
    numpy asks the system to hold in large pages (a decode step of D 512 takes 0.92 of the time, measured). A piece is
    free when all that was cut from it is.
    """

    def __init__(self, piece: int):
        self.piece, self._rest, self._lock = piece, np.empty(0, np.uint8), threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """As np.empty. Threads may share it."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            if size > len(self._rest):
                rest = np.empty(max(size, self.piece) + 64, np.uint8)
                self._rest = rest[-rest.ctypes.data % 64 :]
            own, self._rest = self._rest[:size], self._rest[-(-size // 64) * 64 :]
        return own.view(dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Weights of a checkpoint, read onto their devices.

    Attributes:
      dtype: of the embedding, and of expanded matrices; norms and router stay float32.
      form: whether matrices are expanded or stay int8 with scales.
      mesh: None is the default device.
      pages: where the host makes what is not int8.
    """

    checkpoint: Checkpoint
    dtype: np.dtype
    form: Form
    mesh: Mesh | None = None
    pages: Pages = dataclasses.field(default_factory=lambda: Pages(0))

    def __post_init__(self):
        self.checkpoint.refuse_more()

    @property
    def config(self) -> GrokConfig:
        return self.checkpoint.config

    def weight(self, slot: Slot) -> Weight | ExpertList:
        """Raises as Checkpoint.read does."""
        tensor = self.checkpoint.read(slot)
        form = "expanded" if tensor.scales is None else self.form
        if listed(slot.param, self.config, self.dtype, form):
            return ExpertList(tuple(self._matrix(slot, tensor, e) for e in range(self.config.num_experts)))
        if slot.param.groups is not None:
            return self._matrix(slot, tensor, ...)
        dtype = _unquantised(slot.param, self.dtype)
        floats = tensor.weight
        return self._placed(floats.shape, slot.param.dims, lambda at: self._copied(_finite(slot, floats[at]), dtype))

    def expert(self, slots: Sequence[Slot], number: int) -> tuple[Weight, ...]:
        """One expert's matrix of each slot."""
        return tuple(self._matrix(slot, self.checkpoint.read(slot), number) for slot in slots)

    def _matrix(self, slot: Slot, tensor: Tensor, index) -> Weight:
        weight = tensor.weight[index]
        dims = slot.param.dims[-weight.ndim :]
        place = functools.partial(self._placed, dims=dims)
        if tensor.scales is None:
            return place(weight.shape, part=lambda at: self._copied(_finite(slot, weight[at]), self.dtype))
        scales = _finite(slot, tensor.scales[index])
        stored = scales.shape[-2]
        groups = _groups(stored, dims[-2], self.config, self.mesh)
        scales = np.repeat(scales, groups // stored, axis=-2)
        if self.form == "int8":
            return QuantizedWeight(
                place(weight.shape, part=lambda at: np.ascontiguousarray(weight[at])),
                place(scales.shape, part=lambda at: np.ascontiguousarray(scales[at])),
            )
        rows = len(weight) // len(scales)  # that share a scale

        def expanded(at: tuple[slice, ...]) -> np.ndarray:
            (begin, end, _), part = at[0].indices(len(weight)), weight[at]
            own = QuantizedWeight(part, scales[begin // rows : end // rows, at[1]])
            return dequantize(own, self.pages.empty(part.shape, self.dtype))

        return place(weight.shape, part=expanded)

    def _copied(self, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
        made = self.pages.empty(value.shape, dtype)
        made[...] = value
        return made

    def _placed(self, shape: tuple[int, ...], dims: Sequence[str], part: Callable) -> jax.Array:
        """The array whose parts are part((slice, ...)), on their devices."""
        if self.mesh is None:
            return jax.device_put(part(tuple(slice(0, n) for n in shape)))
        sharding = placed(self.mesh, dims, [self.config.dims[d[0]] for d in dims])
        made: dict[tuple, np.ndarray] = {}  # replicas share a part

        def once(at: tuple[slice, ...]) -> np.ndarray:
            key = tuple(s.indices(n)[:2] for s, n in zip(at, shape, strict=True))
            if key not in made:
                made[key] = part(at)
            return made[key]

        return jax.make_array_from_callback(shape, sharding, once)


def _finite(slot: Slot, values: np.ndarray) -> np.ndarray:
    """The values. Raises TensorFileError for NaN and infinity."""
    if not np.isfinite(values).all():
        raise TensorFileError(
            f"{slot.file} ({slot.path}) holds values that are not finite; `grokscope verify` checks all"
        )
    return values


def _unquantised(param: Param, dtype: np.dtype) -> np.dtype:
    """Type of a weight that is not stored as int8."""
    return dtype if (param.module, param.name) == ("embedding", "w") else np.dtype(np.float32)


def listed(param: Param, config: GrokConfig, dtype: np.dtype, form: Form) -> bool:
    """Whether a resident weight is an ExpertList: experts, unless the kernel multiplies with them, as one array."""
    in_kernel = form == "int8" and kernel.available() and dtype == ml_dtypes.bfloat16
    return param.dims[0] == "E" and not (in_kernel and math.prod(param.shape(config)) < kernel.STACKED)


def _groups(stored: int, rows: str, config: GrokConfig, mesh: Mesh | AbstractMesh | None) -> int:
    """Scale groups of a placed matrix: those stored, repeated so that each part of its rows has groups of its own."""
    return math.lcm(stored, parts((rows,), [config.dims[rows[0]]], mesh))


def described(param: Param, config: GrokConfig, dtype: np.dtype, form: Form, mesh: Mesh | AbstractMesh | None):
    """A weight as Reader places it from a released checkpoint: shapes, types and shardings without values."""

    def leaf(shape: tuple[int, ...], dtype, dims: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else placed(mesh, dims, [config.dims[d[0]] for d in dims])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    shape, dims = param.shape(config), param.dims
    if param.groups is None:
        return leaf(shape, _unquantised(param, dtype), dims)
    as_list = listed(param, config, dtype, form)
    if as_list:
        shape, dims = shape[1:], dims[1:]
    if form == "expanded":
        matrix: Any = leaf(shape, dtype, dims)
    else:
        *lead, rows, columns = shape
        groups = _groups(math.gcd(param.groups, rows), dims[-2], config, mesh)
        scales = leaf((*lead, groups, columns), ml_dtypes.bfloat16, dims)
        matrix = QuantizedWeight(leaf(shape, np.int8, dims), scales)
    return ExpertList((matrix,) * config.num_experts) if as_list else matrix


def device_bytes(tree) -> int:
    """What arrays, or their descriptions, take on one device."""
    shapes = [
        (a.shape if a.sharding is None else a.sharding.shard_shape(a.shape), a.dtype) for a in jax.tree.leaves(tree)
    ]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


@dataclasses.dataclass
class Weights:
    """All parameters on the devices, in the dictionaries of grokscope.model.transformer.

    Attributes:
      ends: embedding and final norm.
      layers: one dictionary per layer.
      form, mesh: as in Reader.
    """

    ends: Params
    layers: list[Params]
    form: Form
    mesh: Mesh | None = None

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.ends, self.layers)))

    def delete(self) -> None:
        for leaf in jax.tree.leaves((self.ends, self.layers)):
            leaf.delete()


def default_form(config: GrokConfig, dtype: np.dtype) -> Form:
    """int8, but on CPU expanded if that takes at most EXPANDED bytes, or half of the memory where the processors have
    several last caches.

    Expanded, grok-1-mini makes a token in 0.5 to 0.8 of the time. A larger model is read from memory for each token,
    and int8 is a quarter: of 576 MB a token takes 0.85 of the time, a prompt of 512 1.05 (two cores). But what one
    processor widens another multiplies: with two last caches int8 takes 2.0 and 1.3 times as long as expanded.
    """
    if jax.default_backend() != "cpu":
        return "int8"
    expanded = config.num_parameters * dtype.itemsize
    limit = machine_memory() / 2 if several_last_caches() else EXPANDED
    return "expanded" if expanded <= max(limit, EXPANDED) else "int8"


def several_last_caches() -> bool:
    """Whether the processors have more than one. False where the system does not say."""
    found = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3/shared_cpu_list")
    return len({path.read_text() for path in found}) > 1


def machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def streaming_memory(mesh: Mesh | None) -> int:
    """Bytes that streamed weights take unless told: half of the machine's memory, or 0.8 of the accelerators'."""
    if jax.default_backend() == "cpu":
        return machine_memory() // 2
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    own = [device for device in devices if device.process_index == jax.process_index()]  # others' cannot be asked
    return int(0.8 * len(devices) * min(device.memory_stats()["bytes_limit"] for device in own))


def load(reader: Reader, progress: Callable[[Iterable[Slot]], Iterable[Slot]] = iter) -> Weights:
    """Everything, a few tensors at a time; host memory stays within those."""
    ends: dict[str, dict] = {}
    layers: list[dict[str, dict]] = [{} for _ in range(reader.config.num_layers)]
    todo = slots(reader.config)
    reader = dataclasses.replace(reader, pages=Pages(PIECE))
    with ThreadPoolExecutor(READERS) as readers:
        made = readers.map(reader.weight, todo)
        for slot, value in zip(progress(todo), made, strict=True):
            params = ends if slot.layer is None else layers[slot.layer]
            params.setdefault(slot.param.module, {})[slot.param.name] = value
    return Weights(ends, list(layers), reader.form, reader.mesh)


class Streamed:
    """Weights that stay on disk but for what a budget of bytes holds; the rest is read while the model runs.

    Resident, in this order as far as the budget goes: embedding, attention of all layers, experts. Each layer keeps the
    experts it used last: a pass goes through all layers in turn, so an order over all layers would evict every expert
    just before it is needed. One thread reads ahead: the next expert while one computes, and the next layer's
    attention; where a layer needed all its experts, the first of the next layer's too.

    Attributes:
      ends: embedding and final norm.
      memory: bytes on all devices together that weights may take, copies and those being read included.
      bytes_read: from disk since it was loaded.
    """

    def __init__(self, reader: Reader, memory: int):
        self.reader, self.memory, self.bytes_read = reader, memory, 0
        self._slots: dict[int | None, list[Slot]] = {}
        for slot in slots(reader.config):
            self._slots.setdefault(slot.layer, []).append(slot)
        floats = any(  # as a checkpoint of another origin may have matrices
            reader.checkpoint.read(slot).scales is None for slot in self._slots[0] if slot.param.groups is not None
        )
        self._files = {slot.file: self._stamp(slot) for slot in slots(reader.config)}
        of_one = stored_bytes(reader.config, reader.dtype, "expanded" if floats else reader.form, reader.mesh)
        sizes = Sizes(*(self._num_devices * size for size in of_one))
        spare = memory - sizes.least
        if spare < 0:
            raise MemoryError(
                f"memory={memory}: streaming this model takes {memory - spare} bytes at least: embedding, two layers "
                "without their experts, and two experts"
            )
        num_layers, num_experts = reader.config.num_layers, reader.config.num_experts
        self._attention_kept = min(num_layers, spare // sizes.attention)
        spare -= self._attention_kept * sizes.attention
        each, more = divmod(spare // sizes.expert, num_layers)
        self._experts_kept = [min(each + (i < more), num_experts) for i in range(num_layers)]
        self._attention: dict[int, Params] = {}
        self._experts = [OrderedDict[int, dict[str, Weight]]() for _ in range(num_layers)]
        self._reading: dict[tuple[int, int | None], Future] = {}
        self._thread = ThreadPoolExecutor(1, "grokscope-read-ahead")
        self.ends = self._whole(None)

    @property
    def form(self) -> Form:
        return self.reader.form

    @property
    def mesh(self) -> Mesh | None:
        return self.reader.mesh

    @property
    def _num_devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def _kept(self) -> list[jax.Array]:
        own = [list(of_layer.values()) for of_layer in self._experts]
        return jax.tree.leaves((self.ends, list(self._attention.values()), own))

    @property
    def nbytes(self) -> int:
        """On all devices between two passes."""
        return self._num_devices * device_bytes(self._kept())

    def delete(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        for leaf in self._kept():
            leaf.delete()

    def attention(self, layer: int) -> Params:
        """Everything of a layer but its experts."""
        self._drop({key for key in self._reading if key[0] != layer})  # of a pass that was cut short
        return self._taken(layer, None)

    def experts(self, layer: int, chosen: Collection[int]) -> Iterator[tuple[list[int], Params]]:
        """The chosen experts in turn: (numbers, parameters in which these are the ones they should be).

        Each is to be done with before the next is asked for. Those that are resident come first, together.
        """
        own, config = self._experts[layer], self.reader.config
        self._drop({key for key in self._reading if key[1] not in (None, *chosen)})
        todo, resident = sorted(set(chosen) - set(own)), sorted(set(chosen) & set(own))
        following = (layer + 1) % config.num_layers
        ahead = [(layer, e) for e in todo] + [(following, None)]
        if len(set(chosen)) == config.num_experts:
            ahead += [(following, e) for e in range(config.num_experts) if e not in self._experts[following]][:1]
        self._read(ahead[0])
        for expert in resident:
            own.move_to_end(expert)
        if resident:
            yield resident, self._params({e: own[e] for e in resident})
        for number, expert in enumerate(todo, 1):
            weights = self._taken(layer, expert)
            for key in ahead[number : number + (2 if expert == todo[-1] else 1)]:
                self._read(key)
            yield [expert], self._params({expert: weights})

    def bytes_to_read(self, passes: Iterable[int]) -> int:
        """From disk, for passes of so many tokens each, at most; nothing that is resident is read again.

        Exact where every expert is chosen and none is kept, but for the one layer that is read ahead at the end.
        """
        config, total, passes = self.reader.config, 0, list(passes)
        for layer in range(config.num_layers):
            attention = self._file_bytes(layer, experts=False)
            expert = self._file_bytes(layer, experts=True) // config.num_experts
            total += attention * (
                layer not in self._attention and (len(passes) if layer >= self._attention_kept else 1)
            )
            if self._experts_kept[layer] == config.num_experts:
                total += expert * (config.num_experts - len(self._experts[layer]))
            else:
                total += expert * sum(min(config.num_experts, n * config.num_selected_experts) for n in passes)
        return total

    def _file_bytes(self, layer: int | None, experts: bool) -> int:
        own = [slot for slot in self._slots[layer] if (slot.param.module == EXPERTS) == experts]
        return sum((self.reader.checkpoint.tensors / slot.file).stat().st_size for slot in own)

    def _params(self, found: dict[int, dict[str, Weight]]) -> Params:
        """Experts that were not asked for are stood in for by one that was: no token of theirs runs."""
        any_one = next(iter(found.values()))
        numbers = range(self.reader.config.num_experts)
        return {EXPERTS: {name: ExpertList(tuple(found.get(e, any_one)[name] for e in numbers)) for name in any_one}}

    def _read(self, key: tuple[int, int | None]) -> None:
        """Begins to read a layer's attention (expert None) or an expert, unless it is there or under way."""
        layer, expert = key
        there = layer in self._attention if expert is None else expert in self._experts[layer]
        if not there and key not in self._reading:
            read = self._whole if expert is None else functools.partial(self._expert, number=expert)
            self._reading[key] = self._thread.submit(read, layer)

    def _drop(self, keys: Collection[tuple[int, int | None]]) -> None:
        """What was read ahead, and is not needed."""
        for key in keys:
            self._reading.pop(key).cancel()

    def _taken(self, layer: int, expert: int | None):
        """What was read, kept if there is room for it."""
        if expert is None and layer in self._attention:
            return self._attention[layer]
        self._read((layer, expert))
        found = self._reading.pop((layer, expert)).result()
        if expert is None:
            if layer < self._attention_kept:
                self._attention[layer] = found
        elif self._experts_kept[layer]:
            own = self._experts[layer]
            if len(own) == self._experts_kept[layer]:
                own.popitem(last=False)
            own[expert] = found
        return found

    def _whole(self, layer: int | None) -> Params:
        params: dict[str, dict] = {}
        own = [slot for slot in self._slots[layer] if slot.param.module != EXPERTS]
        self._refuse_changed(own)
        for slot in own:
            params.setdefault(slot.param.module, {})[slot.param.name] = self.reader.weight(slot)
        self.bytes_read += self._file_bytes(layer, experts=False)
        return jax.block_until_ready(params)

    def _stamp(self, slot: Slot) -> tuple[int, int]:
        found = self.reader.checkpoint.file(slot).stat()
        return found.st_size, found.st_mtime_ns

    def _refuse_changed(self, own: Iterable[Slot]) -> None:
        """Raises RuntimeError for files that have changed since the model was loaded, or two would be mixed."""
        for slot in own:
            if self._stamp(slot) != self._files[slot.file]:
                raise RuntimeError(f"{slot.file} ({slot.path}) has changed since the model was loaded; load it again")

    def _expert(self, layer: int, number: int) -> dict[str, Weight]:
        own = [slot for slot in self._slots[layer] if slot.param.module == EXPERTS]
        self._refuse_changed(own)
        found = self.reader.expert(own, number)
        self.bytes_read += self._file_bytes(layer, experts=True) // self.reader.config.num_experts
        return jax.block_until_ready({slot.param.name: w for slot, w in zip(own, found, strict=True)})


class Sizes(NamedTuple):
    """Bytes on one device."""

    ends: int
    attention: int  # of a layer, with its norms and router
    expert: int

    def whole(self, config: GrokConfig) -> int:
        """Of all weights."""
        return self.ends + config.num_layers * (self.attention + config.num_experts * self.expert)

    @property
    def least(self) -> int:
        """To stream with: the embedding, two layers without their experts, and two experts."""
        return self.ends + 2 * self.attention + 2 * self.expert


def stored_bytes(config: GrokConfig, dtype: np.dtype, form: Form, mesh: Mesh | AbstractMesh | None = None) -> Sizes:
    """What the weights take as they are placed, from shapes alone; int8 as the release stores it."""

    def nbytes(params: Iterable[Param]) -> int:
        return sum(device_bytes(described(p, config, dtype, form, mesh)) for p in params)

    return Sizes(
        nbytes(GLOBAL_PARAMS),
        nbytes(p for p in LAYER_PARAMS if p.module != EXPERTS),
        nbytes(p for p in LAYER_PARAMS if p.module == EXPERTS) // config.num_experts,
    )
