"""What looking costs: generation with captures against generation without, in interleaved pairs.

    python benchmarks/looking.py [PAIRS]

Prints the median of the paired ratios and its 95 % bootstrap interval, on the bundled model.
"""

import sys
import time

import numpy as np

import grokscope as gs

PROMPT = list(range(100, 164))
CASES = {
    "routing (default)": dict(capture=None),
    "routing, resid_post of all layers, all attention entropies": dict(
        capture=["resid_post", gs.capture("attn_pattern", reduce="entropy")]
    ),
    "routing, attention patterns of all heads": dict(capture="attn_pattern"),
}


def ratios(run, plain: dict, looking: dict, pairs: int) -> np.ndarray:
    def seconds(options) -> float:
        begin = time.perf_counter()
        run(options)
        return time.perf_counter() - begin

    for options in (plain, looking, plain, looking):
        run(options)
    found = []
    for i in range(pairs):
        order = (plain, looking) if i % 2 else (looking, plain)
        took = {id(options): seconds(options) for options in order}
        found.append(took[id(looking)] / took[id(plain)])
    return np.array(found)


def main(pairs: int) -> None:
    grok = gs.load()
    rng = np.random.default_rng(0)
    long = PROMPT * 7
    for batch in (1, 8):
        for name, looking in CASES.items():
            prompt, new = (long, 64) if "patterns" in name else (PROMPT, 64)
            prompts = [prompt] * batch

            def run(options, prompts=prompts, new=new):
                grok.generate(prompts, new, stop_at_eos=False, **options)

            found = ratios(run, dict(capture=()), looking, pairs)
            medians = np.median(rng.choice(found, (2000, pairs)), axis=1)
            low, high = np.quantile(medians, [0.025, 0.975])
            print(
                f"batch {batch}, {len(prompt)} + {new} tokens, {name}: {np.median(found):.3f} ({low:.3f} to {high:.3f})"
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
