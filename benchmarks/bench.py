"""The speed table: this project beside its peers and the limits of the machine, measured in turns in one run.

    make bench                     all of it
    python benchmarks/bench.py [decode] [looking] [waiting] [growth] [--rounds 5]

A ratio is the median over rounds of two figures of the same round, with its 95 % bootstrap interval; above 1 the first
is slower. Needs the extra `bench` (torch, transformers, TransformerLens, nnsight).
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import contenders
import numpy as np
from side_by_side import Contender, in_turns, ratio

from grokscope.checkpoint.rehearse import rehearse
from grokscope.checkpoint.weights import default_form
from grokscope.config import GrokConfig

MINI = Path(__file__).parent.parent / "checkpoints" / "grok-1-mini"
D512 = GrokConfig(
    vocab_size=8192, sequence_len=8192, emb_size=512, key_size=64, num_q_heads=8, num_kv_heads=2, num_layers=8,
    widening_factor=4.0078125, embedding_multiplier_scale=512**0.5, output_multiplier_scale=3**-0.5,
    attn_output_multiplier=0.125,
)  # fmt: skip


def row(name: str, *cells: str) -> None:
    print(f"{name:42}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


def measured(made: dict[str, Contender], tasks: list[str], rounds: int) -> dict[tuple[str, str], np.ndarray]:
    """{(contender, task): figures}, task by task, so that its contenders are close in time."""
    found = {}
    for task in tasks:
        runs = {(name, task): partial(one, task) for name, one in made.items() if task in one.tasks}
        found |= in_turns(runs, rounds)
    return found


def decode(path: Path, rounds: int) -> None:
    """Steps and forward passes against the peers, and against memory bandwidth and matrix products."""
    config = GrokConfig.read(path / "config.json")
    default = default_form(config, np.dtype(np.float32))
    made = {
        **{f"grokscope {form}": Contender(contenders.grokscope, path, form) for form in ("expanded", "int8")},
        "Mixtral": Contender(contenders.mixtral, config, "eager"),
        "Mixtral grouped_mm": Contender(contenders.mixtral, config, "grouped_mm"),
        "released": Contender(contenders.released, path),
    }
    limit = Contender(contenders.limits)
    tasks = ["decode 1", "decode 8", "prefill 512", "prefill 32 x 32"]
    before = {name: limit(name) for name in limit.tasks}
    found = measured(made, tasks, rounds)
    after = {name: limit(name) for name in before}
    best = {name: min(before[name], after[name]) for name in before}
    print(f"\n{path.name}: D {config.emb_size}, {config.num_layers} layers, F {config.ffn_size}, float32")
    print(f"reads {1 / best['read']:.1f} GB/s, products {1 / best['product']:.0f} GFLOP/s; by default {default}")
    print(
        "from one processor to another {:.0f} GB/s before, {:.0f} after".format(
            *(1 / t["hand over"] for t in (before, after))
        )
    )
    n = config.dims
    active = config.num_active_parameters  # read once a step, multiplied once a token
    work = 2 * 512 * active + n["L"] * 2 * 512 * 512 * n["HC"]  # attention: the causal half of two products
    floors = {"decode 1": 4 * active / 1e9 * best["read"], "prefill 512": work / 1e9 * best["product"]}
    row("", "ms", "share of the limit", "grokscope takes, of it")
    for task in tasks:
        ours = found[f"grokscope {default}", task]
        for name in made:
            took = found[name, task]
            share = f"{floors[task] / np.median(took):.2f}" if task in floors and "int8" not in name else ""
            against = "" if name == f"grokscope {default}" else ratio(ours, took)
            row(f"{task}, {name}", f"{1e3 * np.median(took):.1f}", share, against)
    for one in (*made.values(), limit):
        one.close()


def looking(path: Path, rounds: int) -> None:
    """What captures cost, here and in the peers; each library against its own plain run."""
    config = GrokConfig.read(path / "config.json")
    made = {
        "grokscope": Contender(contenders.grokscope, path),
        "TransformerLens": Contender(contenders.transformer_lens, config),
        "nnsight": Contender(contenders.nnsight, config),
    }
    looks = ["generate, routing", "generate, all but attention", "generate, attention patterns"]
    tasks = ["generate", *looks, "generate 8", "generate 8, routing", "prefill 512", "full cache", "prefill 32 x 32"]
    found = measured(made, tasks, rounds)
    print(f"\n{path.name}: what looking costs")
    row("", "seconds", "of its plain run", "grokscope takes, of it")
    plain = {"full cache": "prefill 512", "generate 8, routing": "generate 8"} | dict.fromkeys(looks, "generate")
    for task in tasks:
        for name in made:
            if (name, task) not in found:
                continue
            took = found[name, task]
            own = ratio(took, found[name, plain[task]]) if task in plain else ""
            against = "" if name == "grokscope" else ratio(found["grokscope", task], took)
            row(f"{task}, {name}", f"{np.median(took):.3f}", own, against)
    for name in ("TransformerLens", "nnsight"):
        row("our full cache", "", "", f"{ratio(found['grokscope', 'full cache'], found[name, 'prefill 512'])} {name}")
    for one in made.values():
        one.close()


def process_seconds(code: str, repeats: int, **environment: str) -> float:
    took = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | environment)
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


FIRST = "import grokscope as gs; gs.load({path!r}).generate([5, 6, 7], 1, stop_at_eos=False)"


def waiting(rounds: int) -> None:
    """From nothing to a first token, and from one question to the next."""
    import jax

    import grokscope as gs

    print("\nwaiting, seconds")
    row("import jax", f"{process_seconds('import jax', rounds):.2f}")
    row("import grokscope", f"{process_seconds('import grokscope', rounds):.2f}")
    cold, off = FIRST.format(path=str(MINI)), dict(JAX_ENABLE_COMPILATION_CACHE="false")
    process_seconds(cold, 1)
    row("cold process to first token", f"{process_seconds(cold, rounds):.2f}")
    row("  nothing compiled before", f"{process_seconds(cold, rounds, **off):.2f}")
    config = GrokConfig.read(MINI / "config.json")
    with tempfile.TemporaryDirectory() as folder:
        for layers in (8, 64):
            path = rehearse(Path(folder) / str(layers), dataclasses.replace(config, num_layers=layers))
            took = process_seconds(FIRST.format(path=str(path)), rounds, **off)
            row(f"  the same, {layers} layers", f"{took:.2f}")

    jax.config.update("jax_enable_compilation_cache", False)  # or what was compiled in an earlier run is only read
    grok = gs.load()

    def first_token(**options) -> float:
        def stop(_):
            raise KeyboardInterrupt

        begin = time.perf_counter()
        grok.generate([5, 6, 7], 8, on_token=stop, **options)
        return time.perf_counter() - begin

    def at(layer: int):
        return gs.capture("resid_post", layers=layer)

    for option in (at(0), None):
        first_token(capture=option)
    row("another layer of a capture", f"{statistics.median(first_token(capture=at(i)) for i in range(1, 6)):.3f}")
    row("another set of captures", f"{first_token(capture=['q', 'resid_post']):.3f}")
    for tap in ("moe_out", "attn_pattern"):
        took = first_token(capture=["k", gs.capture(tap, layers=1)])
        row(f"  in one layer {tap} too", f"{took:.3f}")
    took = []
    for i in range(6):
        with grok.edits(gs.scale("attn_z", 0.1 * i, layers=i, heads=0)):
            took.append(first_token())
    row("a first edit, then other values", f"{took[0]:.3f}", f"{statistics.median(took[1:]):.3f}")
    grok.close()


GROWTH = """
import time
import numpy as np, grokscope as gs
grok = gs.load({path!r})
rng = np.random.default_rng(0)
ids = lambda n: rng.integers(4, 8192, n)
run = lambda: {call}
run()
begin = time.perf_counter()
run()
took = time.perf_counter() - begin
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(took, 1024 * int(peak.split()[1]))
"""


def grown(path: Path, call: str) -> tuple[float, float]:
    """Seconds of a second run, and peak bytes, in a process of its own."""
    code = GROWTH.format(path=str(path), call=call)
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    seconds, peak = map(float, out.split())
    return seconds, peak


def growth() -> None:
    """Time and memory against tokens, prompts, layers and captures: both per unit, and against the first line."""
    config = dataclasses.replace(GrokConfig.read(MINI / "config.json"), sequence_len=8192)
    with tempfile.TemporaryDirectory() as folder:
        paths = {n: rehearse(Path(folder) / str(n), dataclasses.replace(config, num_layers=n)) for n in (6, 12, 24, 48)}
        tables = {
            "tokens of a prompt": [(n, 6, f"grok.trace(ids({n}), capture=())") for n in (512, 1024, 2048, 4096, 8192)],
            "tokens generated": [(n, 6, f"grok.generate(ids(64), {n}, stop_at_eos=False)") for n in (64, 256, 960)],
            "prompts": [
                (n, 6, f"grok.generate([ids(64) for _ in range({n})], 32, stop_at_eos=False)") for n in (8, 32, 128)
            ],
            "layers": [(n, n, "grok.generate(ids(64), 64, stop_at_eos=False)") for n in paths],
            "captures": [(n, 6, f"grok.trace(ids(512), capture=list(gs.TAPS)[:{n}])") for n in (1, 6, 12, 18)],
        }
        for name, lines in tables.items():
            print()
            row(name, "seconds", "ms for each", "peak MB")
            for count, layers, call in lines:
                seconds, peak = grown(paths[layers], call)
                row(f"  {count}", f"{seconds:.3f}", f"{1e3 * seconds / count:.2f}", f"{peak / 1e6:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["decode", "looking", "waiting", "growth"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        large = rehearse(Path(folder) / "random D 512", D512)
        for part in args.parts:
            if part in ("decode", "looking"):
                for path in (MINI, large):
                    {"decode": decode, "looking": looking}[part](path, args.rounds)
            else:
                {"waiting": partial(waiting, args.rounds), "growth": growth}[part]()


if __name__ == "__main__":
    main()
