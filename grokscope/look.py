"""The look: colours, number formats and HTML that plots, widgets and terminal share. Imports nothing of ours."""

import html
from collections.abc import Iterable, Sequence

EXPERT = ("#1898e9", "#f1aa22", "#364eac", "#49e0a6", "#9b2b06", "#cab8fe", "#7c8708", "#d45d91")
"""Experts 0 to 7, light theme. Found by search: the least distance of any two (OKLab x 100; normal, protan, deutan,
tritan vision) is 20.6, 12.9, 12.1, 13.8. They differ in lightness as much as in hue, so none is re-toned alone."""

SEQUENTIAL = ("#ffffff", "#d3e2ef", "#7daad0", "#2f6aa3", "#0c2748")
DIVERGING = ("#7a3603", "#d97a1b", "#f8d3a4", "#f3f3f3", "#b5d0ea", "#3d7fc0", "#0b3a75")
INK, LABEL, EDGE, WELL = "#111111", "#757575", "#bdbdbd", "#f3f3f3"

GATE_FLOOR = 0.42  # below this share of its colour an expert's hue stops being distinct


def expert_color(expert: int) -> str:
    """Hues repeat after 8: there is no ninth that can be told apart."""
    return EXPERT[expert % len(EXPERT)]


def gate_weight(gate):
    """How much of an expert's colour a gate shows; the rest is background. Numbers or numpy arrays."""
    share = (gate - 0.125) / 0.675
    share = share * (share > 0)
    share = share * (share < 1) + (share >= 1)
    return GATE_FLOOR + (1 - GATE_FLOOR) * share


def ink_on(color: str) -> str:
    """Black or white, whichever has more contrast on the colour (WCAG luminance)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return INK if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 else "#ffffff"


def si(n: float, unit: str = "") -> str:
    """Three figures with a decimal prefix: 7.68 k, 9.25 M, 318 G."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g} {prefix}{unit}"
    return f"{n:.3g} {unit}".rstrip()


def piece_label(piece: str) -> str:
    """A piece outside running text: a leading space shows as a dot, newlines as arrows, because they are part of it."""
    return piece.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")


def facts_html(title: str, facts: dict[str, str]) -> str:
    """A small table: what something is, fact by fact."""
    cell = 'style="text-align:left;padding:1px 12px 1px 0;border:0;background:none"'
    rows = "".join(
        f"<tr><td {cell}>{html.escape(k)}</td><td {cell}>{html.escape(v)}</td></tr>" for k, v in facts.items()
    )
    return f"<div><b>{html.escape(title)}</b><table style='font-variant-numeric:tabular-nums'>{rows}</table></div>"


def tokens_html(pieces: Iterable[str], colors: Sequence[str | None], titles: Sequence[str], boundary: int) -> str:
    """A text, each piece on a tint of its colour over a foot of it; a bar at `boundary`, where decode begins."""
    parts = []
    for i, (piece, color, title) in enumerate(zip(pieces, colors, titles, strict=True)):
        bar = '<span style="border-left:2px solid;margin:0 3px"></span>' if i == boundary else ""
        tint = f"background:{color}40;box-shadow:inset 0 -3px {color}" if color else ""
        shown = html.escape(piece).replace("\n", "⏎<br>")
        parts.append(f'{bar}<span title="{html.escape(title)}" style="{tint}">{shown}</span>')
    style = "font:13px/26px var(--jp-code-font-family,monospace);white-space:pre-wrap"
    return f'<div style="{style}">{"".join(parts)}</div>'
