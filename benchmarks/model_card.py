"""The figures of a model card: held-out loss and expert load by domain, over fixed windows of a token pack.

    python benchmarks/model_card.py checkpoints/grok-1-mini PACK [RUN/state.safetensors]

With the state of the training run, also the loss of its float32 weights, before int8. Prints Markdown.
"""

import sys
from pathlib import Path

import numpy as np

from grokscope import train
from grokscope.checkpoint.ckpt0 import open_checkpoint

WINDOWS = 96  # of 256 tokens, a domain


def main(directory: str, pack: str, state: str | None = None) -> None:
    found = train.evaluate_checkpoint(Path(directory), pack, windows=WINDOWS)
    mixture = found.pop("mixture")
    print("| domain | nats per token | bits per byte |\n|---|---|---|")
    for domain, row in found.items():
        print(f"| {domain} | {row['nats']:.3f} | {row['bits_per_byte']:.3f} |")
    print(f"| **mixture** | **{mixture['nats']:.3f}** | **{mixture['bits_per_byte']:.3f}** |")

    config = open_checkpoint(directory).config
    if state is not None:
        held_out = train.TokenData(pack, "valid", config.vocab_size)
        like = train.fresh_params(config, 0)
        _, saved = train.load_state(Path(state), {"params": like})
        exact = train.evaluate(config, saved["params"], held_out, dtype="float32", windows=WINDOWS)["mixture"]["nats"]
        print(
            f"\nThe float32 weights have {exact:.4f} nats, int8 {mixture['nats']:.4f}: {mixture['nats'] - exact:+.4f}."
        )

    shares = np.stack([row["share"] for row in found.values()])  # [domain, L, E]
    print(f"\nExpert load over all domains alike, % of choices (even is {100 / config.num_experts:.1f}):\n")
    print("| layer | " + " | ".join(f"e{e}" for e in range(config.num_experts)) + " |")
    print("|---" * (config.num_experts + 1) + "|")
    for layer, row in enumerate(shares.mean(0)):
        print(f"| {layer} | " + " | ".join(f"{100 * v:.1f}" for v in row) + " |")

    print("\nHow far a domain's load lies from that of all: sum over experts of share * log2(share / mean), in bits:\n")
    print("| domain | " + " | ".join(f"layer {layer}" for layer in range(config.num_layers)) + " |")
    print("|---" * (config.num_layers + 1) + "|")
    for domain, share in zip(found, shares, strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            bits = np.nansum(share * np.log2(share / shares.mean(0)), axis=-1)
        print(f"| {domain} | " + " | ".join(f"{b:.2f}" for b in bits) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
