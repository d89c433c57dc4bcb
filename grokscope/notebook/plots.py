"""Pictures of a Trace: Trace -> Axes. They take `ax=None`, return the Axes and never call show.

Styled in a context, never globally. Colours are those of grokscope.look, the same as everywhere else.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.patches import Patch

from grokscope import look
from grokscope.run.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONTS = ("Helvetica Neue", "Segoe UI", "Helvetica", "Arial", "DejaVu Sans")
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


def routing(trace: Trace, ax: "Axes | None" = None) -> "Axes":
    """Layer by position: colour is the first expert, strength its gate. The dashed line ends the prompt."""
    experts, gates = trace["expert_index"][..., 0], trace["expert_gate"][..., 0]
    num_layers, length = experts.shape
    num_experts = trace["router_logits"].shape[-1]
    with _styled(ax, 7.2, float(np.clip(1.2 + 0.15 * num_layers, 2.4, 5.2))) as ax:
        palette = np.array([to_rgb(look.expert_color(e)) for e in range(num_experts)])
        weight = look.gate_weight(gates)[..., None]
        ax.imshow(palette[experts] * weight + (1 - weight), extent=(-0.5, length - 0.5, num_layers - 0.5, -0.5))
        if trace.prompt_length < length:
            ax.axvline(trace.prompt_length - 0.5, color=look.INK, linestyle=(0, (2, 1.5)), linewidth=1)
        _layer_ticks(ax, trace.layers["expert_index"])
        if length <= 48:
            labels = [look.piece_label(p) for p in trace.pieces]
            ax.set_xticks(range(length), labels, rotation=90, fontsize=6.5)
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


def expert_load(trace: Trace, ax: "Axes | None" = None) -> "Axes":
    """Layer by expert: each expert's share of the choices, against the even 1/E; prompt and generated tokens apart."""
    experts = trace["expert_index"]
    num_layers, _, k = experts.shape
    num_experts = trace["router_logits"].shape[-1]
    phases = [p for p in ("prefill", "decode") if np.any(trace.phase == p)]
    with _styled(ax, 1.6 + 2.8 * len(phases), float(np.clip(1.2 + 0.2 * num_layers, 2.4, 8))) as ax:
        ticks = []
        for i, phase in enumerate(phases):
            chosen = experts[:, trace.phase == phase]
            counts = (chosen[..., None] == np.arange(num_experts)).sum((1, 2))
            share = counts / counts.sum(1, keepdims=True)
            left = i * (num_experts + 1)
            image = ax.imshow(
                share, cmap=DIVERGING, vmin=0, vmax=2 / num_experts,
                extent=(left - 0.5, left + num_experts - 0.5, num_layers - 0.5, -0.5),
            )  # fmt: skip
            if num_layers <= 16:
                for layer, expert in np.ndindex(share.shape):
                    value = share[layer, expert]
                    color = look.ink_on(to_hex(DIVERGING(value * num_experts / 2)))
                    ax.text(
                        left + expert, layer, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color=color
                    )
            ax.annotate(
                f"{phase}: {chosen.shape[1]} tokens x {k} choices", (left - 0.5, 1), (0, 3),
                xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=7.5, color=look.LABEL,
            )  # fmt: skip
            ticks += [(left + e, str(e)) for e in range(num_experts)]
        ax.set_xlim(-0.5, len(phases) * (num_experts + 1) - 1.5)
        ax.set_xticks(*zip(*ticks, strict=True))
        _layer_ticks(ax, trace.layers["expert_index"])
        ax.set_xlabel("expert")
        ax.set_ylabel("layer")
        ax.set_title("Expert load, % of choices", pad=18)
        bar = ax.figure.colorbar(image, ax=ax, pad=0.02, fraction=0.04)
        bar.set_ticks(
            [0, 1 / num_experts, 2 / num_experts], labels=["0 %", f"1/{num_experts}", f"{200 / num_experts:.3g} %"]
        )
        bar.outline.set_visible(False)
    return ax


def _layer_ticks(ax: "Axes", layers: list[int]) -> None:
    step = -(-len(layers) // 16)
    ax.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
