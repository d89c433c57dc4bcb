"""The command line: generate, demo, dump, inspect, plan, verify, download, rehearse, train.

Errors are one line; `--debug` shows where they come from.
"""

import inspect as inspection
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import grokscope as gs
from grokscope import look
from grokscope.run.dump import refuse_existing

DEMO_PROMPT = "The old keeper of the lighthouse wrote a letter to his brother every morning, but"

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)


@app.callback()
def options(debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False) -> None:
    """Look inside Grok-1 while it generates."""


def main() -> None:
    debug = "--debug" in sys.argv
    sys.argv[1:] = [arg for arg in sys.argv[1:] if arg != "--debug"]  # anywhere on the line
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without some letter loses the letter, not the run
    try:
        app()
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, MemoryError) as err:
        if debug:
            raise
        print(f"grokscope: {err.args[0] if isinstance(err, KeyError) else err}", file=sys.stderr)
        sys.exit(1)


def _stop_if_interrupted(trace: "gs.Trace") -> None:
    if trace.meta["finish"] == "interrupt":
        print("grokscope: interrupted", file=sys.stderr)
        raise typer.Exit(130)


def _bar(unit: str, smallest: int):
    """A progress bar on the terminal, for iterables of at least `smallest` items."""
    from tqdm import tqdm

    return lambda items: tqdm(items, unit=unit, disable=len(items) < smallest, leave=False)


Mesh = Annotated[str | None, typer.Option(help="Devices, data x model, as in 1x8; one if not given.")]
Form = Annotated[str | None, typer.Option(help="expanded, int8 or streamed (from disk); by device if not given.")]
Memory = Annotated[str | None, typer.Option(help="Bytes that streamed weights may take, as in 20GB.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Keep the most probable tokens up to this mass.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many most probable tokens.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Folder of a checkpoint; the bundled grok-1-mini if not given.")]


@app.command(
    epilog='Examples:  grokscope generate "Once upon a time" --temperature 0.7 --seed 3   |   '
    'grokscope generate "def add(" --max-new-tokens 32 --save runs/add'
)
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    checkpoint: Checkpoint = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to make at most.")] = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text; may be given again.")] = None,
    numerics: Annotated[str | None, typer.Option(help="float32 or bfloat16; by device if not given.")] = None,
    mesh: Mesh = None,
    weights: Form = None,
    memory: Memory = None,
    save: Annotated[Path | None, typer.Option(help="Write text, routing and log-probabilities as a dump.")] = None,
) -> None:
    """Continue a text, and print it as it appears."""
    if save is not None:
        refuse_existing(save)
        save.mkdir(parents=True, exist_ok=True)
    grok = gs.load(
        checkpoint, numerics=numerics, weights=weights, mesh=mesh, memory=memory, progress=_bar(" tensors", 500)
    )
    print(grok, file=sys.stderr)
    prompt = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    shown = False

    def show(event: gs.TokenEvent) -> None:
        nonlocal shown
        print(event.text if shown else prompt + event.text, end="", flush=True)
        shown = True

    trace = grok.generate(
        prompt, max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop or (),
        on_token=show,
    )  # fmt: skip
    assert isinstance(trace, gs.Trace)
    print()
    if save is not None:
        print(f"saved to {trace.save(save)}", file=sys.stderr)
    _stop_if_interrupted(trace)


@app.command(epilog="Example:  grokscope demo --out out/demo")
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for pictures and dump; those of an earlier demo are replaced.")
    ] = Path("out/demo"),
    checkpoint: Checkpoint = None,
) -> None:
    """The whole line: prompt, text, routing table, pictures, and a dump that opens again."""
    import matplotlib

    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    if not _of_a_demo(out / "trace"):
        refuse_existing(out / "trace")
    grok = gs.load(checkpoint, progress=_bar(" tensors", 500))
    print(grok)
    print(f"\n{DEMO_PROMPT}", end="", flush=True)
    trace = grok.generate(
        DEMO_PROMPT, max_new_tokens=96, temperature=0.7, top_k=40, seed=0,
        on_token=lambda event: print(event.text, end="", flush=True),
    )  # fmt: skip
    assert isinstance(trace, gs.Trace)
    print("\n")
    _stop_if_interrupted(trace)
    print(routing_table(trace))
    for name in ("routing", "expert_load"):
        getattr(gs.plot, name)(trace).figure.savefig(out / f"{name}.png", dpi=200)
    if _of_a_demo(out / "trace"):
        shutil.rmtree(out / "trace")
    trace.save(out / "trace")
    again = gs.open(out / "trace")
    assert isinstance(again, gs.Trace)
    assert all((again[tap] == trace[tap]).all() for tap in trace.taps)
    print(
        f"\n{out}/routing.png, {out}/expert_load.png: pictures of the table above, token by token and layer by layer."
    )
    print(f'{out}/trace: a dump; import grokscope as gs; gs.open("{out}/trace").to_pandas("router") reads it back.')


def _of_a_demo(directory: Path) -> bool:
    try:
        found = gs.open(directory)
    except (OSError, ValueError, KeyError):
        return False
    return isinstance(found, gs.Trace) and found.text.startswith(DEMO_PROMPT)


def routing_table(trace: gs.Trace) -> str:
    """Per layer: each expert's share of the choices of generated tokens, and the mean probability of each choice."""
    frame = trace.to_pandas("router")
    frame = frame.query("phase == 'decode'")
    num_experts = trace.meta["config"]["num_experts"]
    share = frame.groupby("layer")["expert"].value_counts(normalize=True).unstack(fill_value=0)
    share = share.reindex(columns=range(num_experts), fill_value=0)
    ranks = range(trace.meta["config"]["num_selected_experts"])
    mean = [frame.query("rank == @rank").groupby("layer")["prob"].mean() for rank in ranks]
    places = ", ".join(f"{rank + 1}{('st', 'nd', 'rd')[rank] if rank < 3 else 'th'}" for rank in ranks)
    even, names = f"{100 / num_experts:.1f} %", [f"e{e}" for e in range(num_experts)]
    lines = [
        f"Routing of the {frame.position.nunique()} generated tokens: share of choices per expert (even is {even})",
        f"layer {''.join(f'{name:>6}' for name in names)}   mean prob of {places}",
    ]
    for layer, row in share.iterrows():
        cells = "".join(f"{100 * value:5.0f}%" for value in row)
        lines.append(f"{layer:5} {cells}   " + ", ".join(f"{m[layer]:.2f}" for m in mean))
    return "\n".join(lines)


SELECTORS = [*inspection.signature(gs.capture).parameters][1:]


def _captures(texts: list[str] | None) -> list | None:
    """router_logits,resid_post:layers=2,5:reduce=norm -> captures. Names are divided by commas, selectors by colons."""
    if not texts:
        return None
    found = []
    for item in re.split(r",(?=[^,:=]*[A-Za-z_*])", ",".join(texts)):
        name, *selectors = item.split(":")
        given: dict[str, Any] = {}
        for selector in selectors:
            key, equals, value = selector.partition("=")
            if not equals:
                raise ValueError(
                    f"--capture {item}: {selector!r} is not a selector; expected as in layers=2,5 or reduce=norm "
                    "(a slice is written out, or given in Python)"
                )
            if key not in SELECTORS or key in given:
                what = "is given twice" if key in given else f"is none; there are {', '.join(SELECTORS)}"
                raise ValueError(f"--capture {item}: the selector {key!r} {what}")
            numbers = key != "name" and re.fullmatch(r"-?\d+(,-?\d+)*", value)
            given[key] = [int(n) for n in value.split(",")] if numbers else value
            if key == "later":
                given[key] = {"true": True, "false": False}.get(value, value)
            if key == "k":
                if not re.fullmatch(r"\d+", value):
                    raise ValueError(f"--capture {item}: k={value}: expected a whole number")
                given[key] = int(value)
        try:
            found.append(gs.capture(name, **given))
        except TypeError as err:
            raise ValueError(f"--capture {item}: {err}") from err
    return found


def _prompts(path: Path) -> list:
    """A prompt a line: a JSON text, a list of ids, or an object with "prompt" or "tokens". "-" is stdin."""
    found = []
    try:
        data = sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as err:
        raise ValueError(f"{path} is not UTF-8 text: {err}") from err
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if isinstance(value, dict):
                value = value.get("tokens") if value.get("prompt") is None else value["prompt"]
        except (ValueError, RecursionError) as err:
            raise ValueError(f"{path}, line {number}, is not JSON: {err}") from err
        if not isinstance(value, str | list) or (isinstance(value, list) and not all(type(i) is int for i in value)):
            raise ValueError(f'{path}, line {number}: expected a text, a list of ids, or {{"prompt": ...}}')
        found.append(value)
    if not found:
        raise ValueError(f"{path} holds no prompts")
    return found


Wishes = Annotated[
    list[str] | None,
    typer.Option(help="As in router_logits,resid_post:layers=2,5:reduce=norm; may be given again."),
]
Prompts = Annotated[
    Path,
    typer.Argument(help="JSON lines: a text, a list of ids, or an object with prompt or tokens; - is standard input."),
]


@app.command(
    epilog="Example:  grokscope dump prompts.jsonl out/ --capture router_logits,resid_post:layers=2,5 "
    "--max-new-tokens 64 --budget 2GB --resume"
)
def dump(
    prompts: Prompts,
    out: Annotated[Path, typer.Argument(help="Folder of the dump.")],
    capture: Wishes = None,
    max_new_tokens: Annotated[int, typer.Option(help="0: forward passes alone.")] = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same texts.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 8,
    budget: Annotated[str | None, typer.Option(help="Refuse more bytes than this, as in 2GB.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a dump that was cut short; or begin.")] = False,
    checkpoint: Checkpoint = None,
    numerics: Annotated[str | None, typer.Option(help="float32 or bfloat16; by device if not given.")] = None,
    mesh: Mesh = None,
    weights: Form = None,
    memory: Memory = None,
) -> None:
    """Write activations of many prompts to a folder that `grokscope.open` reads. Under srun all tasks join in."""
    from tqdm import tqdm

    from grokscope.run.processes import is_first, join_slurm

    todo = _prompts(prompts)
    join_slurm()
    grok = gs.load(
        checkpoint, numerics=numerics, weights=weights, mesh=mesh, memory=memory, progress=_bar(" tensors", 500)
    )
    try:
        with tqdm(total=len(todo), unit=" prompts", disable=not is_first()) as bar:
            made = grok.dump(
                todo, out, max_new_tokens, resume=resume, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
                batch_size=batch_size, capture=_captures(capture), budget=budget,
                progress=lambda done: bar.update(done - bar.n),
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"grokscope: interrupted; the same command with --resume goes on in {out}", file=sys.stderr)
        raise typer.Exit(130) from None
    if is_first():
        print(made)


@app.command(epilog="Example:  grokscope inspect out/")
def inspect(
    directory: Annotated[Path, typer.Argument(help="Folder of a dump.")],
    check: Annotated[bool, typer.Option("--verify", help="Read every part and check its sha256.")] = False,
) -> None:
    """Print what is in a dump."""
    from grokscope.run.dump import Dump

    found = Dump(directory)
    print(found)
    for name, value in found.about.items():
        print(f"{name}: {json.dumps(value)[:200]}")
    if len(found):
        trace = found[found.prompts[0]]
        print(f"prompt {found.prompts[0]}: {trace!r}")
        for tap, value in trace.taps.items():
            print(f"  {tap}: {value.dtype} [{' '.join(trace.dims[tap])}] {list(value.shape)}")
    if check:
        found.verify()
        print("every part is as it was written")


@app.command(
    epilog="Examples:  grokscope plan prompts.jsonl --capture attn_pattern --max-new-tokens 64   |   "
    "grokscope plan --model grok-1 --mesh 1x8 --context 8192 --batch 4"
)
def plan(
    prompts: Annotated[Path | None, typer.Argument(help="JSON lines, as for dump.")] = None,
    tokens: Annotated[int | None, typer.Option(help="A number of tokens instead of prompts.")] = None,
    capture: Wishes = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to make a prompt.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch", help="Prompts at once.")] = 8,
    checkpoint: Checkpoint = None,
    numerics: Annotated[str | None, typer.Option(help="float32 or bfloat16; by device if not given.")] = None,
    model: Annotated[str | None, typer.Option(help="grok-1, or a config.json: print which machines it fits.")] = None,
    mesh: Annotated[str | None, typer.Option(help="With --model: devices, data x model; 1x8 if not given.")] = None,
    context: Annotated[
        int | None, typer.Option(help="With --model: tokens of a prompt and what is made of it.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="With --model: int8 (if not given) or expanded.")] = None,
) -> None:
    """Print what captures would take, in bytes on device, host and disk; or, with --model, which machines it fits."""
    of_model, of_prompts = (mesh, context, weights), (prompts, tokens, max_new_tokens or None, checkpoint)
    if any(option is not None for option in (of_prompts if model is not None else of_model)):
        raise ValueError(
            "--mesh, --context and --weights go with --model; prompts, --tokens, --max-new-tokens and --checkpoint "
            "without it"
        )
    if model is not None:
        from grokscope.run.fit import table

        if model != "grok-1" and not Path(model).is_file():
            raise ValueError(f"--model {model}: expected grok-1, or the config.json of a checkpoint")
        config = gs.GROK_1 if model == "grok-1" else gs.GrokConfig.read(Path(model))
        text = table(
            config, mesh or "1x8", context=config.sequence_len if context is None else context, batch=batch_size,
            capture=_captures(capture), numerics=numerics or "bfloat16", form=weights or "int8",
        )  # fmt: skip
        print(text)
        return
    from grokscope.run.engine import unloaded

    grok = unloaded(checkpoint, numerics)
    x = None if prompts is None else _prompts(prompts)
    print(grok.plan(x, max_new_tokens, capture=_captures(capture), tokens=tokens, batch_size=batch_size))


@app.command(epilog="Example:  grokscope verify checkpoints/grok-1")
def verify(directory: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")]) -> None:
    """Check every file of a checkpoint. Exit code 0: as it should be; 1: it is not, and the lines say what."""
    report = gs.verify(directory, progress=_bar(" files", 200))
    _print_report(directory, report)
    raise typer.Exit(0 if report.ok else 1)


def _print_report(directory: Path, report) -> None:
    for problem in report.problems:
        print(problem)
    for note in report.notes:
        print(note)
    size = look.si(report.num_bytes, "B")
    print(
        f"{directory}: {report.num_files} files, {size}: " + ("ok" if report.ok else f"{len(report.problems)} problems")
    )


@app.command(epilog="Example:  grokscope download --from hub --to /big/disk/grok-1")
def download(
    source: Annotated[
        str, typer.Option("--from", help="torrent (through aria2c) or hub (huggingface_hub).")
    ] = "torrent",
    to: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = Path("checkpoints/grok-1"),
) -> None:
    """Fetch Grok-1's 318 GB and verify them. Cut short, the same command goes on where it was."""
    from functools import partial

    from tqdm import tqdm

    from grokscope.checkpoint.download import download, expected_bytes, hub, present_bytes, torrent

    if source not in ("torrent", "hub"):
        raise ValueError(f"--from {source}: expected torrent or hub")
    try:
        with tqdm(
            total=expected_bytes(to), initial=present_bytes(to), unit="B", unit_scale=True, leave=False,
            disable=source == "torrent",
        ) as bar:  # fmt: skip
            fetch = torrent if source == "torrent" else partial(hub, progress=bar.update)
            report = download(to, fetch, _bar(" files", 200))
    except KeyboardInterrupt:
        print(f"grokscope: interrupted; the same command goes on in {to}", file=sys.stderr)
        raise typer.Exit(130) from None
    _print_report(to, report)
    if not report.ok:
        print("Delete the files that are at fault; the same command fetches them again.")
    elif report.checkpoint.tokenizer is None:
        print(f"For prompts of text, put the release's tokenizer.model into {to}.")
    raise typer.Exit(0 if report.ok else 1)


@app.command(epilog="Example:  grokscope rehearse /scratch/rehearsal --layers 3")
def rehearse(
    directory: Annotated[Path, typer.Argument(help="Folder to write; a new or an empty one.")],
    layers: Annotated[int, typer.Option(help="Decoder layers; Grok-1 has 64.")],
    width: Annotated[
        str, typer.Option(help="full: each layer as in Grok-1, 4.9 GB; mini: as in grok-1-mini.")
    ] = "full",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same weights.")] = 0,
) -> None:
    """Write random weights in the released format, with statistics like Grok-1's, to try a machine."""
    from dataclasses import replace

    from grokscope.checkpoint import ckpt0
    from grokscope.checkpoint.rehearse import rehearse
    from grokscope.run.engine import bundled_checkpoint

    if width not in ("full", "mini"):
        raise ValueError(f"--width {width}: expected full or mini")
    mini = ckpt0.open_checkpoint(bundled_checkpoint())
    config, tokenizer = (gs.GROK_1, None) if width == "full" else (mini.config, mini.tokenizer)
    config = replace(config, num_layers=layers)
    try:
        made = rehearse(directory, config, seed, tokenizer, _bar(" files", 1))
    except KeyboardInterrupt:
        print("grokscope: interrupted; nothing stays of what was begun", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"{made}: {look.si(ckpt0.payload_bytes(config), 'B')}, {layers} layers of random weights")
    if tokenizer is None:
        print(f"For prompts of text, put the release's tokenizer.model into {made}; lists of ids need none.")


@app.command(
    epilog="Examples:  grokscope train --data pack --out runs/mini --config mini.json --tokenizer mini.model "
    "--steps 4000   |   grokscope train --data pack --out runs/more --start checkpoints/grok-1-mini --steps 2000.  "
    "Killed, the same command goes on where it was. "
    "Data: what grokscope.corpus.write makes of texts."
)
def train(
    data: Annotated[Path, typer.Option(help="Folder of token ids.")],
    out: Annotated[Path, typer.Option(help="Folder for state, log and the finished checkpoint.")],
    steps: Annotated[int, typer.Option(help="Updates in all.")],
    config: Annotated[Path | None, typer.Option(help="config.json of a model to start from scratch.")] = None,
    start: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.model to put beside the result.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences per update.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Parts of a batch that are computed in turn.")] = 1,
    mesh: Mesh = None,
    sequence_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Highest learning rate; if not given 3e-3 from scratch, 1e-4 from a checkpoint."),
    ] = None,
    decay: Annotated[float, typer.Option(help="Last part of the steps, over which it falls to zero.")] = 0.4,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and data.")] = 0,
) -> None:
    """Train from scratch or from a checkpoint; writes the released format, int8, to OUT/checkpoint."""
    from tqdm import tqdm

    from grokscope import train as training
    from grokscope.checkpoint.ckpt0 import open_checkpoint

    if (config is None) == (start is None):
        found = "neither" if config is None else "both"
        raise ValueError(f"give either --config (from scratch) or --start (a checkpoint); {found} was given")
    if learning_rate is None:
        learning_rate = training.FINE_TUNING if start is not None else training.Recipe.learning_rate
    recipe = training.Recipe(
        steps=steps, batch=batch, accumulate=accumulate, sequence_len=sequence_len, learning_rate=learning_rate,
        decay=decay, seed=seed,
    )  # fmt: skip
    begin = gs.GrokConfig.read(config) if config is not None else open_checkpoint(start)
    try:
        done = training.train(
            data, out, recipe, start=begin, tokenizer=tokenizer, mesh=mesh,
            report=lambda row: tqdm.write("  ".join(f"{k} {v}" for k, v in row.items())),
            progress=lambda todo: tqdm(todo, initial=todo.start, total=todo.stop, unit=" steps"),
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"grokscope: interrupted; the same command goes on in {out}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"written to {done}")
    for domain, row in training.evaluate_checkpoint(done, data, length=sequence_len, mesh=mesh).items():
        print(f"held out, {domain}: {row['nats']:.3f} nats per token, {row['bits_per_byte']:.3f} bits per byte")
