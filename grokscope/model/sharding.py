"""Over which axis of a (data, model) mesh each dimension lies: one table, for weights, activations, cache and captures.

A mesh is in force inside `with on(mesh):`; the functions of the network are traced there, and without one they are what
they are on a single device. A dimension that its axis does not divide lies whole on every device: six heads on a model
axis of eight cost little, and experts, where the bytes are, must divide (`make_mesh` refuses). Weights stay where they
are: rows and columns of experts and attention give partial sums, and activations are what travels.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from grokscope.config import GrokConfig

AXES = {"B": "data", "P": "model", "V": "model", "H": "model", "G": "model", "F": "model"}
"""Dimension letter (HC and GC go with H and G) -> mesh axis; the others lie whole on every device."""


def make_mesh(text: str, config: GrokConfig) -> Mesh:
    """The mesh "DxM" of D * M devices, data by model.

    Raises ValueError naming the meshes that fit, for a text that is none, for too few devices, or for a model axis that
    does not divide the expert width; on several hosts also where devices would be left over.
    """
    devices = jax.devices()
    found = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", str(text))
    fitting = ", ".join(meshes(config, len(devices)))
    if not found:
        raise ValueError(f'mesh={text!r}: expected data x model, as in "1x8"; {len(devices)} devices fit {fitting}')
    data, model = int(found[1]), int(found[2])
    if f"{data}x{model}" not in meshes(config, len(devices)):
        why = (
            f"it takes {data * model} devices and there are {len(devices)}"
            if not 0 < data * model <= len(devices)
            else f"{model} does not divide the expert width {config.ffn_size}"
        )
        raise ValueError(f"mesh={text!r}: {why}; these fit: {fitting}")
    if jax.process_count() > 1 and data * model != len(devices):
        whole = [m for m in meshes(config, len(devices)) if math.prod(map(int, m.split("x"))) == len(devices)]
        raise ValueError(f"mesh={text!r} leaves devices of some hosts idle; these take all: {', '.join(whole)}")
    return Mesh(np.array(devices[: data * model]).reshape(data, model), ("data", "model"), (AxisType.Auto,) * 2)


def meshes(config: GrokConfig, num_devices: int) -> list[str]:
    """Every "DxM" that fits a model and a number of devices."""
    models = [m for m in range(1, num_devices + 1) if config.ffn_size % m == 0]
    return [f"{d}x{m}" for m in models for d in range(1, num_devices // m + 1)]


def name(mesh: Mesh | AbstractMesh | None) -> str:
    return "1x1" if mesh is None else "x".join(str(n) for n in mesh.shape.values())


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """`with on(mesh):` calls and traces run there."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def on_one_device() -> bool:
    return axis_size("data") * axis_size("model") == 1


def on_its_own() -> bool:
    """Whether arrays are those of one device: without a mesh, or inside of `per_shard`."""
    return on_one_device() or bool(jax.sharding.get_abstract_mesh().manual_axes)


def axis_size(axis: str) -> int:
    """Length of an axis of the mesh in force; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def spec(dims: Sequence[str], sizes: Sequence[int], lengths: dict[str, int] | None = None) -> PartitionSpec:
    """Where dims of these sizes lie; `lengths` of the axes, those of the mesh in force if not given."""
    lengths = dict(jax.sharding.get_abstract_mesh().shape) if lengths is None else lengths
    axes = [AXES.get(d[0]) for d in dims]
    return PartitionSpec(*(a if a and n % lengths.get(a, 1) == 0 else None for a, n in zip(axes, sizes, strict=True)))


def constrain(x: jax.Array, dims: Sequence[str]) -> jax.Array:
    """x, laid out by the table."""
    if on_one_device():
        return x
    return jax.lax.with_sharding_constraint(x, spec(dims, x.shape))


def whole(x: jax.Array) -> jax.Array:
    """x, whole on every device."""
    if on_one_device():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def per_shard(fn: Callable, in_specs, out_specs) -> Callable:
    """fn as every device runs it on its own part of the arguments; fn itself on one device."""
    if on_one_device():
        return fn
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def parts(dims: Sequence[str], sizes: Sequence[int], mesh: Mesh | AbstractMesh | None) -> int:
    """Into how many parts the table cuts an array."""
    if mesh is None:
        return 1
    lengths = dict(mesh.shape)
    return math.prod(lengths[axis] for axis in spec(dims, sizes, lengths) if axis)


def placed(mesh: Mesh | AbstractMesh, dims: Sequence[str], sizes: Sequence[int]) -> NamedSharding:
    return NamedSharding(mesh, spec(dims, sizes, dict(mesh.shape)))


def zeros(dims: Sequence[str], shape: Sequence[int], dtype) -> jax.Array:
    """Zeros laid out by the table on the mesh in force."""
    mesh = jax.sharding.get_mesh()
    return _zeros(tuple(shape), dtype, None if mesh.empty else placed(mesh, dims, shape))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype, sharding: NamedSharding | None) -> jax.Array:
    """Compiled: jax.numpy.zeros takes seven times as long to call (27 us), often enough to show in short prompts."""
    made = jax.numpy.zeros(shape, dtype)
    return made if sharding is None else jax.lax.with_sharding_constraint(made, sharding)


def replicated(tree):
    """Arrays of the host, whole on every device of the mesh in force."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(tree)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(np.shape(a), everywhere, np.asarray(a).__getitem__), tree
    )
