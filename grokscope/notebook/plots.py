"""Pictures of Traces, tables and comparisons. They take `ax=None`, return the Axes and never call show.

Styled in a context, never globally. Colours are those of grokscope.look, the same as everywhere else.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.patches import Patch, Rectangle

from grokscope import look
from grokscope.analysis import attention as attention_analysis
from grokscope.analysis import routing as routing_analysis
from grokscope.analysis.compare import Comparison
from grokscope.analysis.lens import lens as lens_table
from grokscope.analysis.sequences import Source
from grokscope.run.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONTS = ("Helvetica Neue", "Segoe UI", "Helvetica", "Arial", "DejaVu Sans")
SEQUENTIAL = LinearSegmentedColormap.from_list("gs.seq", look.SEQUENTIAL)
DIVERGING = LinearSegmentedColormap.from_list("gs.div", look.DIVERGING)
RC = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 8,
    "axes.labelcolor": look.LABEL,
    "axes.edgecolor": look.EDGE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": look.EDGE,
    "ytick.color": look.EDGE,
    "xtick.labelcolor": look.LABEL,
    "ytick.labelcolor": look.LABEL,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "image.interpolation": "nearest",
    "image.aspect": "auto",
}


@contextlib.contextmanager
def _styled(ax: "Axes | None", width: float, height: float) -> "Iterator[Axes]":
    """The given axes or new ones, in our style while they are drawn on."""
    installed = {f.name for f in font_manager.fontManager.ttflist}
    fonts = [f for f in FONTS if f in installed]
    # Outside the context: a first figure may load a notebook's backend, whose settings the context would take back.
    figure = ax.figure if ax is not None else plt.figure(figsize=(width, height), layout="constrained")
    with matplotlib.rc_context(RC | {"font.family": "sans-serif", "font.sans-serif": fonts}):
        yield ax if ax is not None else figure.add_subplot()


def _refuse_parts(trace: Trace) -> None:
    """Raises TypeError for what is no Trace, ValueError unless experts and gates are of the same layers, at all
    positions."""
    if not isinstance(trace, Trace):
        raise TypeError(f"expected a Trace; got {type(trace).__name__}")
    index, gate = ({"L": [], **trace.numbers.get(tap, {})} for tap in ("expert_index", "expert_gate"))
    if "T" in index or "T" in gate:
        raise ValueError("nothing to draw: the Trace has routing of some positions; this plot is of all")
    if index["L"] != gate["L"]:
        raise ValueError(f"the Trace has experts of layers {index['L']} and gates of {gate['L']}; capture the same")


def routing(trace: Trace, ax: "Axes | None" = None) -> "Axes":
    """Layer by position: colour is the first expert, strength its gate. The dashed line ends the prompt."""
    _refuse_parts(trace)
    experts, gates = trace["expert_index"][..., 0], trace["expert_gate"][..., 0]
    num_layers, length = experts.shape
    num_experts = trace.meta["config"]["num_experts"]
    with _styled(ax, 7.2, float(np.clip(1.2 + 0.15 * num_layers, 2.4, 5.2))) as ax:
        palette = np.array([to_rgb(look.expert_color(e)) for e in range(num_experts)])
        weight = look.gate_weight(gates)[..., None]
        ax.imshow(palette[experts] * weight + (1 - weight), extent=(-0.5, length - 0.5, num_layers - 0.5, -0.5))
        if trace.prompt_length < length:
            ax.axvline(trace.prompt_length - 0.5, color=look.INK, linestyle=(0, (2, 1.5)), linewidth=1)
        _layer_ticks(ax, trace.layers["expert_index"])
        if length <= 48:
            labels = [look.piece_label(p) for p in trace.pieces]
            ax.set_xticks(range(length), labels, rotation=90, fontsize=6.5, parse_math=False)
        else:
            ax.set_xlabel("position (tokens)")
        ax.set_ylabel("layer")
        ax.set_title("First expert of each token; strength = gate")
        handles = [Patch(color=look.expert_color(e), label=str(e)) for e in range(num_experts)]
        ax.legend(
            handles=handles,
            title="expert",
            loc="upper left",
            bbox_to_anchor=(1.005, 1),
            handlelength=1,
            borderaxespad=0,
        )
    return ax


def expert_load(source: "Source | pd.DataFrame", ax: "Axes | None" = None) -> "Axes":
    """Layer by expert: each expert's share of the choices, against the even 1/E; prompt and generated tokens apart.

    Takes what `analysis.load` takes, or its table.
    """
    frame = source if isinstance(source, pd.DataFrame) else routing_analysis.load(source)
    layers = sorted(set(frame.layer))
    num_layers, num_experts = len(layers), round(1 / frame.uniform.iloc[0])
    phases = list(frame.groupby("phase", sort=False))
    with _styled(ax, 1.6 + 2.8 * len(phases), float(np.clip(1.2 + 0.2 * num_layers, 2.4, 8))) as ax:
        ticks = []
        for i, (phase, own) in enumerate(phases):
            share = own.pivot(index="layer", columns="expert", values="share")
            share = share.reindex(index=layers, columns=range(num_experts)).to_numpy()
            left = i * (num_experts + 1)
            image = ax.imshow(
                share, cmap=DIVERGING, vmin=0, vmax=2 / num_experts,
                extent=(left - 0.5, left + num_experts - 0.5, num_layers - 0.5, -0.5),
            )  # fmt: skip
            if num_layers <= 16:
                for layer, expert in np.argwhere(~np.isnan(share)):
                    value = share[layer, expert]
                    color = look.ink_on(to_hex(DIVERGING(value * num_experts / 2)))
                    ax.text(
                        left + expert, layer, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color=color
                    )
            tokens, prompts = own.tokens.iloc[0], own.prompts.iloc[0]
            ax.annotate(
                f"{phase}: {tokens} tokens" + (f", {prompts} prompts" if prompts > 1 else ""), (left - 0.5, 1), (0, 3),
                xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=7.5, color=look.LABEL,
            )  # fmt: skip
            ticks += [(left + e, str(e)) for e in range(num_experts)]
        ax.set_xlim(-0.5, len(phases) * (num_experts + 1) - 1.5)
        ax.set_xticks(*zip(*ticks, strict=True))
        _layer_ticks(ax, layers)
        ax.set_xlabel("expert")
        ax.set_ylabel("layer")
        ax.set_title("Expert load, % of choices", pad=18)
        bar = ax.figure.colorbar(image, ax=ax, pad=0.02, fraction=0.04)
        bar.set_ticks(
            [0, 1 / num_experts, 2 / num_experts], labels=["0 %", f"1/{num_experts}", f"{200 / num_experts:.3g} %"]
        )
        bar.outline.set_visible(False)
    return ax


def router_entropy(source: "Source | pd.DataFrame", ax: "Axes | None" = None) -> "Axes":
    """Mean entropy of the router at each layer, prefill and decode, with 95 % intervals; the dotted line is log2 E.

    Takes what `analysis.entropy` takes, or its table.
    """
    frame = source if isinstance(source, pd.DataFrame) else routing_analysis.entropy(source)
    with _styled(ax, 3.5, 2.4) as ax:
        for style, (phase, own) in zip(({"mfc": "white"}, {}), frame.groupby("phase", sort=False), strict=False):
            label = f"{phase}: {own.tokens.iloc[0]} tokens, {own.prompts.iloc[0]} prompts"
            ax.plot(own.layer, own.entropy, marker="o", ms=4, lw=1.2, color=look.INK, label=label, **style)
            ax.fill_between(own.layer, own.low, own.high, color=look.EDGE, alpha=0.4, lw=0)
        ax.axhline(frame.most.iloc[0], color=look.LABEL, linestyle=":", linewidth=1)
        ax.set_ylim(0, max(frame.most.iloc[0], 1) * 1.05)
        ax.set_xlabel("layer")
        ax.set_ylabel("entropy (bits)")
        ax.set_title("Routing entropy")
        ax.legend(loc="lower left")
    return ax


def coactivation(source: "Source | pd.DataFrame", layer: int, ax: "Axes | None" = None) -> "Axes":
    """Expert by expert at one layer: log2 of how much oftener two are chosen together than independence says.

    Takes what `analysis.coactivation` takes (its phases are then joined), or its table. A dot: the 95 % interval
    excludes 1.
    """
    frame = source if isinstance(source, pd.DataFrame) else routing_analysis.coactivation(source, phase="all")
    own = _of_layer(frame, layer)
    size = int(own.other.max()) + 1
    grid, sure = np.full((size, size), np.nan), np.zeros((size, size), bool)
    with np.errstate(divide="ignore"):
        value = np.log2(own.lift.to_numpy())
    for a, b in ((own.expert, own.other), (own.other, own.expert)):
        grid[a, b] = value
        sure[a, b] = (own.low > 1) | (own.high < 1)
    return _lift_grid(grid, sure, ax, own, f"Chosen together, layer {layer}", "expert", "expert")


def transitions(source: "Source | pd.DataFrame", layer: int, ax: "Axes | None" = None) -> "Axes":
    """From the experts of a layer to those of the next: log2 of lift; dots as in `coactivation`."""
    frame = source if isinstance(source, pd.DataFrame) else routing_analysis.transitions(source, phase="all")
    own = _of_layer(frame, layer)
    shape = own.expert.nunique(), own.next.nunique()
    with np.errstate(divide="ignore"):
        grid = np.log2(own.lift.to_numpy()).reshape(shape)
    sure = ((own.low > 1) | (own.high < 1)).to_numpy().reshape(shape)
    after = int(own.next_layer.iloc[0])
    return _lift_grid(grid, sure, ax, own, f"Layer {layer} to {after}", f"expert at {after}", f"expert at {layer}")


def attention(trace: Trace, layer: int, head: int | None = None, ax: "Axes | None" = None) -> "Axes":
    """One head, row reads column, or (head=None) a sheet of all heads of the layer. Colour is the square root.

    Needs "attn_pattern", or q and k (`capture("attn_pattern", later=True)`).
    """
    ((_, numbers, positions, pattern),) = attention_analysis.patterns(trace, layer)
    if head is not None and head not in numbers:
        raise KeyError(f"head {head} of layer {layer} was not kept; kept are {[*map(int, numbers)]}")
    ends = (trace.prompt_length, (np.asarray(positions) < trace.prompt_length).sum())  # of the prompt: keys, rows
    with _styled(ax, *((3.5, 3.5) if head is not None else (7.2, 1.1 + 1.05 * -(-len(numbers) // 8)))) as ax:
        if head is not None:
            image = np.sqrt(pattern[list(numbers).index(head)])
            ax.imshow(_masked(image, positions), cmap=SEQUENTIAL, vmin=0, vmax=1)
            if trace.prompt_length < len(trace):
                for line, end in zip((ax.axvline, ax.axhline), ends, strict=True):
                    line(end - 0.5, color=look.EDGE, linestyle=(0, (2, 1.5)), linewidth=0.8)
            if len(trace) <= 40:
                labels = [look.piece_label(p) for p in trace.pieces]
                ax.set_xticks(range(len(trace)), labels, rotation=90, fontsize=6, parse_math=False)
                ax.set_yticks(range(len(positions)), [labels[i] for i in positions], fontsize=6, parse_math=False)
            else:
                rows = range(0, len(positions), -(-len(positions) // 8))
                ax.set_yticks(rows, [str(positions[row]) for row in rows])
            ax.set_title(f"Head {layer}.{head}: row reads column (square root)")
            return ax
        ax.set_axis_off()
        columns = min(8, len(numbers))
        rows = -(-len(numbers) // columns)
        for i, number in enumerate(numbers):
            row, column = divmod(i, columns)
            inner = ax.inset_axes((column / columns, 1 - (row + 1) / rows, 0.9 / columns, 0.82 / rows))
            inner.imshow(_masked(np.sqrt(pattern[i]), positions), cmap=SEQUENTIAL, vmin=0, vmax=1)
            inner.set_xticks([])
            inner.set_yticks([])
            inner.set_title(str(number), fontsize=7, pad=2)
        ax.set_title(f"Heads of layer {layer}, {len(trace)} positions; colour: square root", pad=14)
    return ax


def token_strip(trace: Trace, layer: int = 0, ax: "Axes | None" = None) -> "Axes":
    """The text, each token on the colour of its first expert at a layer, strength = gate; underlined: generated."""
    _refuse_parts(trace)
    experts, gates = trace["expert_index", layer][..., 0], trace["expert_gate", layer][..., 0]
    per_line, lines = 88, [[]]
    for i, piece in enumerate(trace.pieces):
        label = look.piece_label(piece)
        if sum(len(label) for _, label in lines[-1]) + len(label) > per_line:
            lines.append([])
        lines[-1].append((i, label))
        if piece.endswith("\n"):
            lines.append([])
    with _styled(ax, 7.2, 0.5 + 0.2 * len(lines)) as ax:
        ax.set_axis_off()
        ax.set_xlim(0, per_line)
        ax.set_ylim(len(lines), -0.1)
        for row, line in enumerate(lines):
            x = 0
            for i, label in line:
                tone = np.array(to_rgb(look.expert_color(experts[i]))) * (w := 0.7 * look.gate_weight(gates[i])) + 1 - w
                ax.add_patch(Rectangle((x, row + 0.08), len(label), 0.84, facecolor=tone, linewidth=0))
                ax.text(
                    x, row + 0.52, label, family="monospace", fontsize=6.6, va="center", color=look.INK,
                    parse_math=False,
                )  # fmt: skip
                if i >= trace.prompt_length:
                    ax.plot((x, x + len(label)), (row + 0.92,) * 2, color=look.INK, linewidth=0.6)
                x += len(label)
        ax.set_title(f"First expert at layer {layer}; underlined: generated")
    return ax


def logit_lens(trace: Trace, tap: str = "resid_post", ax: "Axes | None" = None) -> "Axes":
    """Layer by position: the token the stream would predict, shaded by its probability. Needs a captured lens.

    Words are written where there is room for them, up to 32 positions: capture some (`positions=`) of a longer text.
    """
    frame = lens_table(trace, tap).query("best == 0")
    if "layer" not in frame:
        raise ValueError(f"{tap} has no layers to draw; grokscope.analysis.lens has its table")
    layers, positions = np.unique(frame.layer), np.unique(frame.position)
    probs = np.exp(frame.logprob.to_numpy()).reshape(len(layers), len(positions))
    words = frame.word.to_numpy().reshape(probs.shape)
    ranks = frame["rank"].to_numpy().reshape(probs.shape)
    with _styled(ax, float(np.clip(1.2 + 0.42 * len(positions), 3.5, 11)), 0.9 + 0.22 * len(layers)) as ax:
        ax.imshow(probs, cmap=SEQUENTIAL, vmin=0, vmax=1)
        written = len(positions) <= 32
        if written:
            for row, column in np.ndindex(probs.shape):
                label = look.piece_label(words[row, column])[:7]
                color = look.ink_on(to_hex(SEQUENTIAL(probs[row, column])))
                weight = "bold" if ranks[row, column] == 0 else "normal"
                ax.text(
                    column, row, label, ha="center", va="center", fontsize=6, color=color, weight=weight,
                    parse_math=False,
                )  # fmt: skip
            labels = [look.piece_label(trace.pieces[i]) for i in positions]
            ax.set_xticks(range(len(positions)), labels, rotation=90, parse_math=False)
        _layer_ticks(ax, list(layers))
        ax.set_ylabel("layer")
        best = "best next token after each layer, shade = probability; bold: it followed"
        ax.set_title(f"Lens: {best if written else 'probability of the best next token after each layer'}", fontsize=8)
    return ax


def compare(comparison: Comparison, ax: "Axes | None" = None) -> "Axes":
    """Layer by aligned token: how far the router's probabilities of two runs are apart (0 alike, 1 nothing in common).

    The line is where the texts part.
    """
    if not isinstance(comparison, Comparison):
        raise TypeError(f"expected what grokscope.compare(a, b) gives; got {type(comparison).__name__}")
    if not comparison.layers:
        raise ValueError("nothing to draw: both runs need routing of the same layers at all positions")
    count = comparison.routing.shape[1]
    if not count:
        raise ValueError("nothing to draw: the two runs have no token in common")
    with _styled(ax, 7.2, float(np.clip(1.2 + 0.15 * len(comparison.layers), 2.2, 5.2))) as ax:
        image = ax.imshow(comparison.routing, cmap=SEQUENTIAL, vmin=0, vmax=1)
        _layer_ticks(ax, comparison.layers)
        if comparison.divergence is not None:
            at = int((comparison.pairs.max(1) < comparison.divergence).sum()) - 0.5
            ax.axvline(at, color=look.INK, linestyle=(0, (2, 1.5)), linewidth=1)
        if count <= 48:
            labels = [look.piece_label(comparison.a.pieces[i]) for i, _ in comparison.pairs]
            ax.set_xticks(range(count), labels, rotation=90, fontsize=6.5, parse_math=False)
        ax.set_ylabel("layer")
        ax.set_title(f"Routing distance of two runs, {count} aligned tokens; dashed: texts part")
        ax.figure.colorbar(image, ax=ax, pad=0.01, fraction=0.03).outline.set_visible(False)
    return ax


def _masked(image: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Keys that a row cannot see left white."""
    hidden = np.arange(image.shape[-1]) > np.asarray(positions)[:, None]
    return np.ma.masked_array(image, hidden)


def _of_layer(frame: pd.DataFrame, layer: int) -> pd.DataFrame:
    """Rows of one layer and of one phase."""
    if layer not in set(frame.layer):
        raise KeyError(f"layer {layer} is not in the table; it has {sorted(set(frame.layer))}")
    own = frame.query("layer == @layer")
    if own.phase.nunique() > 1:
        raise ValueError(f"the table has phases {', '.join(own.phase.unique())}; give one, or phase='all'")
    return own


def _lift_grid(grid, sure, ax, own: pd.DataFrame, title: str, across: str, down: str) -> "Axes":
    with _styled(ax, 3.8, 3.4) as ax:
        image = ax.imshow(np.clip(grid, -3, 3), cmap=DIVERGING, vmin=-3, vmax=3)
        rows, columns = np.nonzero(sure)
        for row, column in zip(rows, columns, strict=True):
            color = look.ink_on(to_hex(DIVERGING((np.clip(grid[row, column], -3, 3) + 3) / 6)))
            ax.plot(column, row, "o", ms=2, color=color)
        ax.set_xticks(range(grid.shape[1]))
        ax.set_yticks(range(grid.shape[0]))
        ax.set_xlabel(across)
        ax.set_ylabel(down)
        ax.set_title(f"{title}: {own.tokens.iloc[0]} tokens, {own.prompts.iloc[0]} prompts")
        bar = ax.figure.colorbar(image, ax=ax, pad=0.02, fraction=0.045)
        bar.set_ticks([-3, 0, 3], labels=["1/8", "1", "8 x"])
        bar.outline.set_visible(False)
    return ax


def _layer_ticks(ax: "Axes", layers: list[int]) -> None:
    step = -(-len(layers) // 16)
    ax.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
