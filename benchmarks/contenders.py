"""What is timed: this project, the released arithmetic, and the libraries that a user would take instead.

Each `build` returns {task: call}, for side_by_side. The peers run Hugging Face's Mixtral of the same shape with random
weights, in float32: the same products as Grok-1 but for two norms a layer. The same task has the same name everywhere:

    decode B           seconds of a step of B rows behind 64 tokens, from two generations of different length
    prefill 512        a forward pass of one prompt
    full cache         the same, everything that the library can keep of it kept
    prefill 32 x 32    forward passes of 32 prompts of 32 tokens, in one call
    generate           64 tokens behind 64, greedy; and while what the router says is kept, token by token
"""

import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from side_by_side import Tasks

from grokscope.config import GrokConfig

NEW = 64


def prompts(config: GrokConfig, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(4, config.vocab_size, (batch, length))


def step_seconds(generate, few: int, many: int) -> float:
    """Seconds that generate(n) takes for one token more."""
    took = []
    for n in (few, many):
        begin = time.perf_counter()
        generate(n)
        took.append(time.perf_counter() - begin)
    return (took[1] - took[0]) / (many - few)


def handed_over() -> float:
    """Seconds to hand 1 GB from one processor to another: 2 MB are written by the first, which takes them back from the
    other for that, and read by the other, again and again.

    Two processors that shared their last cache did 19 GB/s; while they did not, about 6 (8.7 written and 23 read,
    beside other work).
    """
    processors = sorted(os.sched_getaffinity(0))
    part = np.empty(1 << 19, np.float32)

    def pinned(processor: int) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, initializer=os.sched_setaffinity, initargs=(0, {processor}))

    def seconds(call, *arguments) -> float:
        begin = time.perf_counter()
        call(*arguments)
        return time.perf_counter() - begin

    with pinned(processors[0]) as writer, pinned(processors[-1]) as reader:
        took = [
            writer.submit(seconds, part.fill, 1.0).result() + reader.submit(seconds, part.sum).result()
            for _ in range(100)
        ]
    return float(np.median(took)) / part.nbytes * 1e9


def limits() -> Tasks:
    """Seconds to read 1 GB of float32, and for 1 G of operations in a product of 2048 x 2048: the better of two; and to
    hand 1 GB from one processor to another.
    """
    import jax
    import torch

    big, square = np.ones((64, 1 << 20), np.float32), np.ones((2048, 2048), np.float32)
    ours = [jax.numpy.asarray(big), jax.numpy.asarray(square)]
    theirs = [torch.from_numpy(big), torch.from_numpy(square)]
    total, product = jax.jit(lambda a: a.sum()), jax.jit(lambda a: a @ a)

    def best(*calls) -> float:
        took = []
        for call in calls * 3:
            begin = time.perf_counter()
            call()
            took.append(time.perf_counter() - begin)
        return min(took)

    return {
        "read": lambda: best(lambda: float(total(ours[0])), theirs[0].sum) / big.nbytes * 1e9,
        "product": lambda: (
            best(lambda: product(ours[1]).block_until_ready(), lambda: theirs[1] @ theirs[1]) / (2 * 2048**3) * 1e9
        ),
        "hand over": handed_over,
    }


def grokscope(path: Path, weights: str | None = None) -> Tasks:
    import grokscope as gs

    grok = gs.load(path, weights=weights)
    one, long = prompts(grok.config, 1, 64)[0], prompts(grok.config, 1, 512)[0]
    short = list(prompts(grok.config, 32, 32))

    def generate(n: int, x=one, capture=()):
        return grok.generate(x, n, stop_at_eos=False, capture=capture)

    eight = list(prompts(grok.config, 8, 64))
    others = [tap for tap in gs.TAPS if not tap.startswith("attn_") or tap in ("attn_z", "attn_out", "attn_delta")]
    return {
        "decode 1": lambda: step_seconds(generate, 16, 80),
        "decode 8": lambda: step_seconds(functools.partial(generate, x=eight), 16, 48),
        "prefill 512": lambda: grok.trace(long, capture=()),
        "prefill 32 x 32": lambda: grok.trace(short, capture=()),
        "full cache": lambda: grok.trace(long, capture=gs.TAPS),
        "generate": lambda: generate(NEW),
        "generate, routing": lambda: generate(NEW, capture=None),
        "generate, all but attention": lambda: generate(NEW, capture=others),
        "generate, attention patterns": lambda: generate(NEW, capture="attn_pattern"),
        "generate 8": lambda: generate(NEW, eight),
        "generate 8, routing": lambda: generate(NEW, eight, None),
    }


def released(path: Path) -> Tasks:
    from released import Released

    model = Released(path)
    batch = prompts(model.config, 8, 64)
    return {
        "decode 1": lambda: step_seconds(lambda n: model.generate(batch[:1], n), 1, 5),
        "decode 8": lambda: step_seconds(lambda n: model.generate(batch, n), 1, 5),
        "prefill 512": lambda: model.generate(prompts(model.config, 1, 512), 1),
        "prefill 32 x 32": lambda: model.generate(prompts(model.config, 32, 32), 1),
    }


def _mixtral(config: GrokConfig):
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    n = config.dims
    shape = transformers.MixtralConfig(
        vocab_size=n["V"], hidden_size=n["D"], intermediate_size=n["F"], num_hidden_layers=n["L"],
        num_attention_heads=n["H"], num_key_value_heads=n["G"], head_dim=n["C"], num_local_experts=n["E"],
        num_experts_per_tok=n["K"], max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(shape).eval()
    torch.set_grad_enabled(False)
    return model


def _ids(config: GrokConfig, batch: int, length: int):
    import torch

    return torch.from_numpy(prompts(config, batch, length))


def mixtral(config: GrokConfig, experts: str) -> Tasks:
    """`experts`: how transformers runs them, "eager" or "grouped_mm"; "batched_mm" copies them for every token."""
    model = _mixtral(config)
    model.set_experts_implementation(experts)
    batch, long, short = _ids(config, 8, 64), _ids(config, 1, 512), _ids(config, 32, 32)

    def generate(n: int, x=batch[:1]):
        return model.generate(x, attention_mask=x * 0 + 1, max_new_tokens=n, min_new_tokens=n, do_sample=False)

    return {
        "decode 1": lambda: step_seconds(generate, 16, 48),
        "decode 8": lambda: step_seconds(functools.partial(generate, x=batch), 8, 24),
        "prefill 512": lambda: model(long),
        "prefill 32 x 32": lambda: model(short),
        "generate": lambda: generate(NEW),
    }


def transformer_lens(config: GrokConfig) -> Tasks:
    model = _mixtral(config)
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model.set_experts_implementation("eager")
    bridge = build_bridge_from_module(model, "MixtralForCausalLM", hf_config=model.config)
    one, long, short = _ids(config, 1, 64), _ids(config, 1, 512), _ids(config, 32, 32)

    def generate():
        options = dict(stop_at_eos=False, do_sample=False, verbose=False, return_type="tokens")
        return bridge.generate(one, max_new_tokens=NEW, **options)

    def routed():
        kept = []
        names = [f"blocks.{i}.mlp.gate.hook_out" for i in range(config.num_layers)]
        with bridge.hooks(fwd_hooks=[(name, lambda value, hook: kept.append(value.clone())) for name in names]):
            generate()
        assert len(kept) == NEW * config.num_layers, len(kept)

    return {
        "prefill 512": lambda: bridge(long),
        "prefill 32 x 32": lambda: bridge(short),
        "full cache": lambda: bridge.run_with_cache(long),
        "generate": generate,
        "generate, routing": routed,
    }


def nnsight(config: GrokConfig) -> Tasks:
    model = _mixtral(config)
    model.set_experts_implementation("eager")
    import tokenizers
    import transformers
    from nnsight import TransformersModel

    words = tokenizers.models.WordLevel({f"<{i}>": i for i in range(config.vocab_size)}, unk_token="<3>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), pad_token="<0>")
    sight = TransformersModel(model, tokenizer=tokenizer)
    one, long, short = _ids(config, 1, 64), _ids(config, 1, 512), _ids(config, 32, 32)
    options = dict(attention_mask=one * 0 + 1, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

    def forward(x):
        with sight.trace(x):
            logits = sight.output.logits.save()
        return logits

    def cached():
        with sight.trace(long) as tracer:
            kept = tracer.cache()
        return kept

    def generate():
        with sight.generate(one, **options) as tracer:
            out = tracer.result.save()
        return out

    def routed():
        with sight.generate(one, **options) as tracer:
            kept = list().save()
            for _ in tracer.iter[:NEW]:
                for layer in sight.model.layers:
                    kept.append(layer.mlp.gate.output)
        assert len(kept) == NEW * config.num_layers, len(kept)

    return {
        "prefill 512": lambda: forward(long),
        "prefill 32 x 32": lambda: forward(short),
        "full cache": cached,
        "generate": generate,
        "generate, routing": routed,
    }
