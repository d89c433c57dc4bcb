"""The figures of a model card: held-out loss, expert load by domain, circuits, samples, over a token pack.

    python benchmarks/model_card.py checkpoints/grok-1-mini PACK [RUN/state.safetensors]

With the state of the training run, also the loss of its float32 weights, before int8. Prints Markdown. Baselines are
in baselines.py.
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np

import grokscope as gs
from grokscope import analysis, train
from grokscope.checkpoint.ckpt0 import open_checkpoint

WINDOWS = 96  # of 256 tokens, a domain
PROMPTS = {
    "story": "The old keeper of the lighthouse",
    "essay": "The purpose of government is",
    "reference": "Copper (n.): a metal",
    "scripture": "In the beginning God",
    "manual": "To install the package,",
    "languages": "Der Befehl kann",
    "python": "def read_file(path):\n",
    "c": "static int init(void)\n{\n",
    "web": "export function add(a, b) {\n",
    "arithmetic": "7 + 5 =",
}


def main(directory: str, pack: str, state: str | None = None) -> None:
    found = train.evaluate_checkpoint(Path(directory), pack, windows=WINDOWS)
    mixture = found.pop("mixture")
    print("| domain | nats per token | bits per byte |\n|---|---|---|")
    for domain, row in found.items():
        print(f"| {domain} | {row['nats']:.3f} | {row['bits_per_byte']:.3f} |")
    print(f"| **mixture** | **{mixture['nats']:.3f}** | **{mixture['bits_per_byte']:.3f}** |")

    config = open_checkpoint(directory).config
    held_out = train.TokenData(pack, "valid", config.vocab_size)
    if state is not None:
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

    with gs.load(directory) as grok:
        by_position(grok, held_out)
        circuits(grok, held_out)
        samples(grok)


def by_position(grok: gs.Grok, held_out: train.TokenData) -> None:
    """Whether the whole context helps: loss by position in windows as long as that, 12 a domain."""
    length = grok.config.sequence_len
    nats = np.zeros(length - 1)
    for domain, share in held_out.weights.items():
        traces = grok.trace(list(held_out.windows(domain, length - 1, 12)), capture=[])
        nats -= share / sum(held_out.weights.values()) * np.mean([trace.logprobs[1:] for trace in traces], axis=0)
    print(f"\nNats per token by position, in windows of {length} tokens, 12 a domain:\n")
    print("| positions | nats |\n|---|---|")
    edges = [1, *(1 << power for power in range(5, (length - 1).bit_length())), length]
    for begin, end in itertools.pairwise(edges):
        print(f"| {begin} to {end - 1} | {nats[begin - 1 : end - 1].mean():.3f} |")


def circuits(grok: gs.Grok, held_out: train.TokenData) -> None:
    """Domain and routing beyond chance, heads on repeated random tokens, and what the loss gains without each part."""
    rng = np.random.default_rng(0)
    domains = [domain for domain in held_out.weights for _ in range(12)]
    windows = [held_out.window(domain, rng, 127) for domain in domains]
    special = analysis.specialisation(grok.trace(windows), domains)
    print("\nInformation between domain and expert, bits a choice; null: domains shuffled between windows:\n")
    print("| layer | information | null | 95 % of the null | ratio |\n|---|---|---|---|---|")
    for row in special.itertuples():
        ratio = row.information / row.null
        print(f"| {row.layer} | {row.information:.3f} | {row.null:.3f} | {row.null_high:.3f} | {ratio:.1f} |")

    halves = [rng.choice(np.arange(300, 4000), 24, replace=False) for _ in range(32)]
    repeated = grok.trace([[grok.config.bos_token, *half, *half] for half in halves], capture="attn_pattern")
    heads = analysis.heads(repeated)
    print(
        "\nHeads on 24 random tokens, twice (32 times): the best of each measure, 95 % interval, uniform attention:\n"
    )
    print("| measure | head | score | uniform |\n|---|---|---|---|")
    for measure in ("induction", "previous", "duplicate", "first"):
        for row in heads[heads.measure == measure].nlargest(3, "score").to_dict("records"):
            place = f"{row['layer']}.{row['head']}"
            score = f"{row['score']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            print(f"| {measure} | {place} | {score} | {row['uniform']:.3f} |")

    texts = windows[::6]
    print(f"\nNats a token that the loss gains on {len(texts)} windows of 128 tokens without a part:\n")
    for over in ("layers", "heads", "experts"):
        frame = analysis.ablations(grok, texts, over)
        grid = frame.effect.to_numpy().reshape(grok.config.num_layers, -1)
        columns = ["nats"] if over == "layers" else range(grid.shape[1])
        print(f"| {over} |" + "".join(f" {column} |" for column in columns))
        print("|---" * (grid.shape[1] + 1) + "|")
        for layer, row in enumerate(grid):
            print(f"| layer {layer} |" + "".join(f" {v:.3f} |" for v in row))
        print()


def samples(grok: gs.Grok) -> None:
    """Prompts of every domain, continued by 48 tokens at temperature 0.7 with seeds 0 to 4: all of them, unselected."""
    for domain, prompt in PROMPTS.items():
        print(f"\n**{domain}**: prompt {json.dumps(prompt, ensure_ascii=False)}\n\n```text")
        for seed in range(5):
            text = grok.generate(prompt, 48, temperature=0.7, seed=seed).text.removeprefix(prompt)
            print(f"{seed} {json.dumps(text, ensure_ascii=False)}")
        print("```")


if __name__ == "__main__":
    main(*sys.argv[1:])
