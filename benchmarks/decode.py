"""Seconds of everyday work on the bundled model, and the cost of looking, measured side by side in one run.

    python benchmarks/decode.py [rounds]

Generation with and without routing captured is interleaved; medians, and the median of paired ratios with a bootstrap
interval. Beside them: reading float32 from memory and a matrix product, the limits of this machine at this moment.
"""

import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import grokscope as gs


def seconds(fn) -> float:
    begin = time.perf_counter()
    fn()
    return time.perf_counter() - begin


def main(rounds: int = 20) -> None:
    load = seconds(lambda: gs.load().close())
    grok = gs.load()
    print(grok, f"\nload average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, jax {jax.__version__}")
    rng = np.random.default_rng(0)
    prompt, long = rng.integers(4, grok.config.vocab_size, (2, 512))

    def generate(capture, prompts):
        return lambda: grok.generate(prompts, max_new_tokens=64, stop_at_eos=False, capture=capture)

    one, eight = prompt[:64], [prompt[i : i + 64] for i in range(8)]
    work = {
        "generate 64 + 64, nothing captured": generate((), one),
        "generate 64 + 64, routing captured": generate(None, one),
        "generate 8 x (64 + 64), nothing captured": generate((), eight),
        "generate 8 x (64 + 64), routing captured": generate(None, eight),
        "trace 512 tokens, nothing captured": lambda: grok.trace(long, capture=()),
        "trace 512 tokens, all taps": lambda: grok.trace(long, capture=gs.TAPS),
    }
    for fn in work.values():
        fn()
    times = {name: [] for name in work}
    for _ in range(rounds):
        for name, fn in work.items():
            times[name].append(seconds(fn))
    print(f"load {load:.2f} s")
    for name, values in times.items():
        print(f"{name:44} median {1e3 * np.median(values):7.1f} ms, least {1e3 * min(values):7.1f}")
    names = list(work)
    for plain, looking in zip(names[::2], names[1::2], strict=True):
        ratios = np.array(times[looking]) / np.array(times[plain])
        draws = np.median(rng.choice(ratios, (2000, rounds)), axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        print(f"{looking} / nothing: {np.median(ratios):.3f} ({low:.3f} to {high:.3f})")

    big = jnp.ones((64, 1 << 20))
    total = jax.jit(lambda a: a.sum())
    square = jnp.ones((2048, 2048))
    product = jax.jit(lambda a: a @ a)
    for fn, a in ((total, big), (product, square)):
        fn(a).block_until_ready()
    read = min(seconds(lambda: total(big).block_until_ready()) for _ in range(5))
    multiply = min(seconds(lambda: product(square).block_until_ready()) for _ in range(5))
    print(f"memory read {big.nbytes / read / 1e9:.1f} GB/s, product {2 * 2048**3 / multiply / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
