"""Time and memory of the routing analyses on a dump of a million tokens at 64 layers.

    python benchmarks/analysing.py

Routing is simulated (2,000 prompts of 500 tokens, each with its own preferences); seconds beside `import pandas`.
"""

import dataclasses
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import grokscope as gs
from grokscope import analysis
from grokscope.run.dump import Writer

PROMPTS, TOKENS, LAYERS, EXPERTS = 2_000, 500, 64, 8


def simulated(seed: int) -> gs.Trace:
    rng = np.random.default_rng(seed)
    tokens = rng.zipf(1.3, TOKENS) % 8192
    taste = 0.5 * rng.normal(size=(LAYERS, 1, EXPERTS)) + np.sin(tokens[:, None] % 20 + np.arange(EXPERTS))
    order = np.argsort(taste + rng.gumbel(size=(LAYERS, TOKENS, EXPERTS)), axis=-1)
    config = dataclasses.asdict(dataclasses.replace(gs.GROK_1, vocab_size=8192))
    return gs.Trace(
        tokens=tokens.astype(np.int32), pieces=[f"p{i}" for i in tokens], text="", continuation="",
        prompt_length=TOKENS, logprobs=np.zeros(TOKENS, np.float32),
        taps={"expert_index": order[..., ::-1][..., :2].astype(np.int32)}, dims={"expert_index": "LTK"},
        numbers={"expert_index": {"L": list(range(LAYERS))}}, meta={"config": config, "prompt": seed},
    )  # fmt: skip


def main(folder: str) -> None:
    dump = gs.open(folder)
    kinds = np.array([f"kind {i % 20}" for i in range(8192)], object)
    calls = {
        "load": lambda: analysis.load(dump),
        "coactivation": lambda: analysis.coactivation(dump),
        "transitions": lambda: analysis.transitions(dump),
        "specialisation by 20 classes": lambda: analysis.specialisation(dump, kinds),
        "specialisation by prompt": lambda: analysis.specialisation(dump, [i % 10 for i in range(PROMPTS)]),
        "specialisation by token": lambda: analysis.specialisation(dump, "token"),
        "lift by 20 classes": lambda: analysis.lift(dump, kinds),
    }
    for name, call in calls.items():
        begun = time.perf_counter()
        rows = len(call())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name:30} {time.perf_counter() - begun:6.1f} s, {rows} rows, peak so far {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            with Writer(Path(folder) / "d", {}, PROMPTS) as writer:
                for prompt in range(PROMPTS):
                    writer.add(prompt, simulated(prompt))
            subprocess.run([sys.executable, __file__, f"{folder}/d"], check=True)
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import pandas"], check=True)
            print(f"for scale: import pandas takes {time.perf_counter() - begun:.1f} s")
