"""What a layer of Grok-1's width becomes on H100s, compiled on a machine without any: its kernels in order, seconds of
compilation, bytes of temporaries.

    pip install "jax-cuda13-plugin==X" "jax-cuda13-pjrt==X"     X: the jax that is installed
    python benchmarks/ahead.py [--tokens 1] [--rows 1] [--cache 2048] [--mesh 1x8]

Nothing is tuned, since that runs kernels: XLA's own products of matrices have other tiles on a card.
"""

import argparse
import dataclasses
import os
import re
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grokscope.checkpoint.weights import described
from grokscope.config import GROK_1
from grokscope.model import kernel
from grokscope.model.params import LAYER_PARAMS
from grokscope.model.sharding import on, placed
from grokscope.model.transformer import KVCache, Positions
from grokscope.run import steps
from grokscope.run.hooks import PLAIN, Given
from grokscope.run.steps import DecodeState

BF16 = np.dtype(jnp.bfloat16)
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 device_memory_size: 84978434048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def lowered(mesh: Mesh, rows: int, tokens: int, cache: int):
    """A decode step's layer (one token) or a prompt's."""
    config = dataclasses.replace(GROK_1, num_layers=1)
    whole = NamedSharding(mesh, PartitionSpec())

    def array(dims: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, BF16, sharding=placed(mesh, dims, shape))

    def on_all(tree):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), tree)

    params: dict[str, dict] = {}
    for param in LAYER_PARAMS:
        params.setdefault(param.module, {})[param.name] = described(param, config, BF16, "int8", mesh)
    with on(mesh):
        held = KVCache.shape(config, rows, cache)
        held = KVCache(array(KVCache.dims(held), held), array(KVCache.dims(held), held))
        x = array("BTD", (rows, tokens, config.emb_size))
        start = jax.ShapeDtypeStruct((rows,), np.int32)
        at = on_all(jax.eval_shape(lambda start: Positions.of(config, start, tokens), start))
        if tokens == 1:
            state = on_all(DecodeState.idle(rows))
            return steps.decode_layer.lower(config, PLAIN, params, x, held, at, state, {}, Given(), np.int32(0))
        ids = np.zeros((rows, tokens), np.int32)
        place = on_all((at, ids, ids.astype(bool)))
        return steps.layer.lower(config, PLAIN, params, x, held, *place, {}, Given())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--cache", type=int, default=2048)
    parser.add_argument("--mesh", default="1x1")
    args = parser.parse_args()
    shape = tuple(int(n) for n in args.mesh.split("x"))
    topology = topologies.get_topology_desc("", "cuda", topology=f"1x{np.prod(shape)}x1", target_config=H100)
    mesh = Mesh(np.array(topology.devices).reshape(shape), ("data", "model"), (AxisType.Auto,) * 2)
    # This process has a CPU; what asks where it runs is to answer for the cards.
    jax.default_backend, kernel.available = (lambda: "gpu"), (lambda: True)
    ready = lowered(mesh, args.rows, args.tokens, args.cache)
    with tempfile.TemporaryDirectory() as dump:
        begin = time.perf_counter()
        compiled = ready.compile(compiler_options={"xla_dump_to": dump})
        took = time.perf_counter() - begin
        (thunks,) = Path(dump).glob("*thunk_sequence.txt")
        listed = [line for line in thunks.read_text().splitlines() if re.match(r"\s*\d+:", line)]
    print("\n".join(re.sub(r"\[prev=.*?\]|\[source.*?\]", "", line) for line in listed))
    print(f"{took:.1f} s, {compiled.memory_analysis().temp_size_in_bytes / 1e6:.0f} MB of temporaries")


if __name__ == "__main__":
    main()
