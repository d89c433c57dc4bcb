"""What Grok-1's steps become on H100s, compiled on a machine without any: kernels in order, seconds, temporaries.

A layer over a prompt's first block, a layer of a generation step, and the head.

    pip install "jax-cuda13-plugin==X" "jax-cuda13-pjrt==X"     X: the jax that is installed
    python benchmarks/ahead.py [--context 1024] [--batch 1] [--mesh 1x8]

Nothing is tuned, since that runs kernels: XLA's own products of matrices have other tiles on a card.
"""

import argparse
import os
import re
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from grokscope.config import GROK_1
from grokscope.model import kernel
from grokscope.run.fit import lowered

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mesh", default="1x1")
    args = parser.parse_args()
    shape = tuple(int(n) for n in args.mesh.split("x"))
    topology = topologies.get_topology_desc("", "cuda", topology=f"1x{np.prod(shape)}x1", target_config=H100)
    mesh = Mesh(np.array(topology.devices).reshape(shape), ("data", "model"), (AxisType.Auto,) * 2)
    # This process has a CPU; what asks where it runs is to answer for the cards.
    jax.default_backend, kernel.available = (lambda: "gpu"), (lambda: True)
    for name, ready in lowered(GROK_1, mesh, args.context, args.batch, "bfloat16", "int8").items():
        with tempfile.TemporaryDirectory() as dump:
            begin = time.perf_counter()
            compiled = ready.compile(compiler_options={"xla_dump_to": dump})
            took = time.perf_counter() - begin
            (thunks,) = Path(dump).glob("*thunk_sequence.txt")
            listed = [line for line in thunks.read_text().splitlines() if re.match(r"\s*\d+:", line)]
        print("\n".join([f"\n{name}", *(re.sub(r"\[prev=.*?\]|\[source.*?\]", "", line) for line in listed)]))
        print(f"{took:.1f} s, {compiled.memory_analysis().temp_size_in_bytes / 1e6:.0f} MB of temporaries", flush=True)


if __name__ == "__main__":
    main()
