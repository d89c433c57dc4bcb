"""What a run keeps in bytes, from shapes alone: nothing is compiled, allocated or run.

device (on a mesh, each of them): buffers of the decode step, their copy while it goes to the host, and of the captures
of prompts that run together what has not left yet. host: the arrays of all Traces, if every prompt makes all its
tokens. disk: the same arrays in a dump; its headers, texts and tables are not counted.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from grokscope import look
from grokscope.model.sharding import parts
from grokscope.run import landing
from grokscope.run.captures import REDUCTIONS, Kept
from grokscope.run.decode import batches, block_lengths, cache_length, num_rows, reading_groups, shapes
from grokscope.run.staging import Hooks, places_of
from grokscope.run.steps import COLUMNS

DISKS = (1, 3, 7)  # GB/s: a SATA disk or a network, an NVMe disk, a fast one


@dataclasses.dataclass(frozen=True)
class Plan:
    """The price of a run.

    Attributes:
      rows: {capture: {"device": bytes, "host": bytes, "disk": bytes}}.
      prompts, tokens: how many, generated ones included.
      read: bytes that streamed weights read from disk at most.
    """

    rows: dict[str, dict[str, int]]
    prompts: int
    tokens: int
    read: int = 0

    @property
    def total(self) -> dict[str, int]:
        return {place: sum(row[place] for row in self.rows.values()) for place in ("device", "host", "disk")}

    @property
    def _about(self) -> str:
        return f"{self.prompts} prompt{'s' * (self.prompts > 1)}, {self.tokens} tokens"

    def _table(self) -> list[tuple[str, ...]]:
        rows = [*self.rows.items(), ("in all", self.total)]
        return [(name, *(look.si(n, "B") for n in row.values())) for name, row in rows]

    def __repr__(self) -> str:
        lines = [(self._about, "device", "host", "disk"), *self._table()]
        width = max(len(line[0]) for line in lines)
        rows = [f"{name:{width}}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in lines]
        return "\n".join([*rows, *self._reading()])

    def _reading(self) -> list[str]:
        if not self.read:
            return []
        times = ", ".join(f"{self.read / speed / 1e9:,.3g} s at {speed} GB/s" for speed in DISKS)
        return [f"weights read from disk: {look.si(self.read, 'B')} at most ({times})"]

    def _repr_html_(self) -> str:
        body = "".join(f"<tr><td>{'</td><td>'.join(line)}</td></tr>" for line in self._table())
        head = f"<th>{self._about}</th><th>device</th><th>host</th><th>disk</th>"
        read = "".join(f"<p>{line}</p>" for line in self._reading())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{read}"


def priced(hooks: Hooks, batch_size: int, dtype, mesh: Mesh | AbstractMesh | None, streamed: bool) -> Plan:
    """The price of the captures of a call; `streamed`: with streamed weights."""
    lengths = [tuple(s) for s in hooks.sequences]
    slots, length = shapes(lengths, batch_size, mesh)
    together = batches(lengths, slots)
    groups = reading_groups(together, lengths, slots) if streamed else [[batch] for batch in together]
    of_batch = {  # of those that run together, at most
        kept.key: max(sum(_batch(hooks, kept, batch, dtype, mesh) for batch in group) for group in groups)
        for kept in hooks.kept
    }
    share = _share_there(hooks, of_batch)
    rows = {}
    for kept in hooks.kept:
        num_layers, decode = len(places_of(kept)), _decode(hooks, kept, slots, length, dtype, mesh)
        device = num_layers * decode
        # What other layers drop: one buffer for all, and a stream at a time.
        if _captured(hooks, kept, decode=True) > num_layers and not streamed:
            device += decode // 2
        if _captured(hooks, kept) > num_layers and kept.reduce == "lens":
            device += of_batch[kept.key]
        device += math.ceil(num_layers * of_batch[kept.key] * (share if _leaves(kept) else 1))
        host = num_layers * sum(_host(hooks, kept, prompt, dtype) for prompt in range(len(lengths)))
        rows[kept.key] = {"device": device, "host": host, "disk": host}
    return Plan(rows, len(lengths), sum(s.longest for s in hooks.sequences))


def _decode(hooks: Hooks, kept: Kept, slots: int, length: int, dtype, mesh: Mesh | AbstractMesh | None) -> int:
    if not slots or not hooks.reaches(kept)[1]:
        return 0
    if kept.pooled:
        return _nbytes(hooks.pool(kept, slots))
    return 2 * sum(
        math.prod(shape) // parts(dims, shape, mesh) * np.dtype(own).itemsize
        for dims, shape, own in hooks.buffer_shapes(kept, slots, COLUMNS, length, dtype).values()
    )


def _batch(hooks: Hooks, kept: Kept, prompts: list[int], dtype, mesh: Mesh | AbstractMesh | None) -> int:
    if not any(len(hooks.prompt_positions(kept, prompt)) for prompt in prompts):
        return 0
    rows, n = num_rows(len(prompts)), max(hooks.sequences[prompt].prompt_length for prompt in prompts)
    if kept.pooled:
        return _nbytes(hooks.pool(kept, rows))
    padded = hooks.padded_positions(kept.key, prompts).shape[1]
    cut = hooks.cut(kept, prompts)
    lengths = [padded if cut else block for block in block_lengths(n)]
    sizes = hooks.dims(kept) | {"B": rows, "T": sum(lengths), "S": cache_length(n)}
    size = _size(_with_rows(kept.outputs()), sizes, dtype, mesh)
    if kept.reduce == "lens":  # and the streams, until it is known what follows
        size += _size(_with_rows(hooks.in_step(kept)), sizes, dtype, mesh)
    return size


def _with_rows(outputs: dict[str, tuple]) -> dict[str, tuple]:
    return {key: ("B" + dims, own) for key, (dims, own) in outputs.items()}


def _leaves(kept: Kept) -> bool:
    """Whether its layers leave the device one after the other."""
    return not kept.pooled and kept.reduce != "lens"


def _captured(hooks: Hooks, kept: Kept, decode: bool = False) -> int:
    """At how many places."""
    return sum(hooks.captures(kept, place, decode) for place in hooks.places)


def _share_there(hooks: Hooks, of_batch: dict[str, int]) -> float:
    """How much of a batch's captures that leave is on the device at most, of all that is kept of them."""
    leaving = list(filter(_leaves, hooks.kept))
    kept = [sum(of_batch[k.key] for k in leaving if place in places_of(k)) for place in hooks.places]
    there = [sum(of_batch[k.key] for k in leaving if hooks.captures(k, place)) for place in hooks.places]
    dropped = max(all_ - own for all_, own in zip(there, kept, strict=True))
    held = min(sum(kept) + dropped, max(there) + max(*there, landing.ON_THEIR_WAY))
    return held / sum(kept) if any(kept) else 1


def _host(hooks: Hooks, kept: Kept, prompt: int, dtype) -> int:
    if not hooks.takes(kept, prompt):
        return 0
    sequence = hooks.sequences[prompt]
    positions = int(kept.where.mask(sequence.prompt_length, sequence.longest).sum())
    if kept.pooled and not positions:
        return 0
    return _size(kept.outputs(), hooks.dims(kept) | {"T": positions, "S": sequence.longest}, dtype)


def _size(outputs: dict[str, tuple], sizes: dict[str, int], dtype, mesh: Mesh | AbstractMesh | None = None) -> int:
    shapes = [(dims, tuple(sizes[d] for d in dims), own or dtype) for dims, own in outputs.values()]
    return sum(math.prod(shape) // parts(dims, shape, mesh) * np.dtype(own).itemsize for dims, shape, own in shapes)


def _nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def as_bytes(budget: int | str, name: str = "budget") -> int:
    """Bytes of 2000000, "2GB" or "500 mb" (decimal). Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)b?\s*", str(budget).lower())
    if isinstance(budget, bool) or not found:
        raise ValueError(f'{name}={budget!r}: expected bytes, or a text like "2GB" or "500 MB"')
    return int(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}[found[2]])


def refuse_over(budget: int | str | None, hooks: Hooks, *pricing) -> None:
    """Raises MemoryError if device, host or disk would take more than the budget; it names what would fit. `pricing`:
    the other arguments of `priced`.
    """
    if budget is None:
        return
    limit, plan = as_bytes(budget), priced(hooks, *pricing)
    if max(plan.total.values()) <= limit:
        return
    dearest = max(hooks.kept, key=lambda kept: max(plan.rows[kept.key].values()))
    rest = {place: plan.total[place] - plan.rows[dearest.key][place] for place in plan.total}
    fitting = []
    for name, reduction in REDUCTIONS.items():
        if dearest.reduce or dearest.tap not in reduction.taps:
            continue
        reduced = dataclasses.replace(dearest, reduce=name, k=min(dearest.k, 5))
        other = Hooks(hooks.config, (reduced,), (), hooks.sequences)
        (row,) = priced(other, *pricing).rows.values()
        if all(rest[place] + row[place] <= limit for place in row):
            fitting.append(f"reduce={name!r} ({look.si(max(row.values()), 'B')})")
    advice = f"; of {dearest.key}, the dearest, these would fit: {', '.join(fitting)}" if fitting else ""
    raise MemoryError(
        f"over the budget of {look.si(limit, 'B')}:\n{plan}\nKeep fewer layers, heads or positions"
        + (advice or f" of {dearest.key}, the dearest")
    )
