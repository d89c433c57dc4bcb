"""Peak memory of a dump of 1,000 and of 10,000 prompts: router and one residual layer, 16 + 8 tokens each, or 16.

    python benchmarks/dumping.py

Each dump runs in a process of its own. Memory should not grow with the number of prompts.
"""

import resource
import subprocess
import sys
import tempfile
import time

import numpy as np


def dumped(count: int, new: int) -> None:
    import grokscope as gs

    with gs.load() as grok, tempfile.TemporaryDirectory() as folder:
        prompts = np.random.default_rng(0).integers(3, grok.config.vocab_size, (count, 16)).tolist()
        begun = time.perf_counter()
        made = grok.dump(prompts, f"{folder}/d", new, capture=["router_logits", gs.capture("resid_post", layers=3)])
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = f"{made.nbytes / 1e6:.0f} MB in {made!r}"
        print(f"{count:>6} prompts, {new} new tokens: peak {peak:.0f} MiB, {seconds:.0f} s, {size}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        dumped(*map(int, sys.argv[1:]))
    else:
        for new in (8, 0):
            for count in (1_000, 10_000):
                subprocess.run([sys.executable, __file__, str(count), str(new)], check=True)
