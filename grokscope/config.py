"""The shape of a Grok-1 network, as a frozen value, and its JSON form.

Key names are those of the release. What follows from them (expert width, head ratio, parameter count) is a property.
"""

import dataclasses
import json
from pathlib import Path

MOST = 1 << 31  # of any size
MOST_LAYERS = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrokConfig:
    """Sizes and constants of one network; checked once, when built."""

    vocab_size: int
    sequence_len: int  # context, in tokens
    emb_size: int  # D
    key_size: int  # C, width of one head
    num_q_heads: int  # H
    num_kv_heads: int  # G
    num_layers: int  # L
    widening_factor: float  # expert width before the 2/3 rule, as a multiple of D
    num_experts: int = 8  # E
    num_selected_experts: int = 2  # K
    pad_token: int = 0  # as released; nothing here pads with it
    bos_token: int = 1
    eos_token: int = 2
    prompt_bos: bool = False  # whether a text prompt gets BOS in front; ids are never changed
    embedding_multiplier_scale: float
    output_multiplier_scale: float
    attn_output_multiplier: float

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                wanted = isinstance(value, bool)
            elif field.type is int:
                wanted = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST
            else:
                wanted = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e38
            if not wanted:
                kinds = {bool: "true or false", int: "a whole number from 0, below 2**31", float: "a positive number"}
                raise ValueError(f"{field.name}={value!r}: expected {kinds[field.type]}")
        tokens = ("pad_token", "bos_token", "eos_token")
        for name in (f.name for f in dataclasses.fields(self) if f.type is int and f.name not in tokens):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}=0: expected at least 1")
        if self.num_layers > MOST_LAYERS:
            raise ValueError(f"num_layers={self.num_layers}: at most {MOST_LAYERS}, as five digits number the files")
        if self.widening_factor * self.emb_size >= MOST:
            raise ValueError(f"widening_factor={self.widening_factor}: experts of {self.emb_size} would be too wide")
        if self.ffn_size < 1:
            raise ValueError(f"widening_factor={self.widening_factor}: experts of {self.emb_size} would have no width")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"num_q_heads={self.num_q_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.num_selected_experts > self.num_experts:
            raise ValueError(f"num_selected_experts={self.num_selected_experts} exceeds num_experts={self.num_experts}")
        if self.key_size % 2:
            raise ValueError(f"key_size={self.key_size} is odd; rotary embedding turns pairs of channels")
        for name in tokens:
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} lies outside the vocabulary of {self.vocab_size}")

    @property
    def ffn_size(self) -> int:
        """F, the hidden width of one expert: two thirds of widening_factor * D, rounded up to a multiple of 8."""
        return -(-(int(self.widening_factor * self.emb_size) * 2 // 3) // 8) * 8

    @property
    def dims(self) -> dict[str, int]:
        """Length of each dimension letter, as used in the tables of weights and taps."""
        return {
            "V": self.vocab_size,
            "D": self.emb_size,
            "H": self.num_q_heads,
            "G": self.num_kv_heads,
            "C": self.key_size,
            "E": self.num_experts,
            "K": self.num_selected_experts,
            "F": self.ffn_size,
            "L": self.num_layers,
            "HC": self.num_q_heads * self.key_size,
            "GC": self.num_kv_heads * self.key_size,
        }

    @property
    def num_parameters(self) -> int:
        return self._count(self.num_experts)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets: its K experts of E, the embedding table counted once."""
        return self._count(self.num_selected_experts)

    def _count(self, experts: int) -> int:
        n = self.dims
        attention = n["D"] * (2 * n["HC"] + 2 * n["GC"])
        layer = attention + 3 * experts * n["D"] * n["F"] + n["D"] * n["E"] + 4 * n["D"]
        return n["L"] * layer + n["V"] * n["D"] + n["D"]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "config") -> "GrokConfig":
        """Raises ValueError naming `source` and the key at fault: unknown, missing, or of a wrong kind."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as err:
            raise ValueError(f"{source} is not JSON: {err}") from err
        if not isinstance(values, dict):
            raise ValueError(f"{source} holds a JSON {type(values).__name__}, expected an object of sizes")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - fields.keys())
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        if unknown or missing:
            raise ValueError(f"{source}: unknown keys {unknown}, missing keys {missing}; known are {list(fields)}")
        try:
            return cls(**values)
        except ValueError as err:
            raise ValueError(f"{source}: {err}") from err

    @classmethod
    def read(cls, path: Path) -> "GrokConfig":
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8-sig"), str(path))
        except UnicodeDecodeError as err:
            raise ValueError(f"{path} is not UTF-8 text: {err}") from err


GROK_1 = GrokConfig(
    vocab_size=131072,
    sequence_len=8192,
    emb_size=6144,
    key_size=128,
    num_q_heads=48,
    num_kv_heads=8,
    num_layers=64,
    widening_factor=8,
    embedding_multiplier_scale=78.38367176906169,
    output_multiplier_scale=0.5773502691896257,
    attn_output_multiplier=0.08838834764831845,
)
"""xAI's Grok-1, as released in March 2024: 315,684,820,992 parameters."""
