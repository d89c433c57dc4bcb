"""Token ids to train on: a folder that `TokenData` reads and `write` makes of texts.

It holds `meta.json` with {"weights": {domain: share}, "bytes_per_token": {domain: number}}, and `train.<domain>` and
`valid.<domain>` with the ending .u16 or, for vocabularies beyond 65536 such as Grok-1's, .u32 (little-endian; also
packed, .xz behind that). Each document is its ids and EOS, behind BOS where the model's prompts have one.
"""

import json
import lzma
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from grokscope.config import GrokConfig
from grokscope.tokenizer import Tokenizer

WIDTHS = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}


class TokenData:
    """Token ids by domain, drawn in proportion to the weights of meta.json."""

    def __init__(self, directory: Path | str, split: str, vocab_size: int):
        directory = Path(directory)
        self.weights, self.bytes_per_token = _meta(directory / "meta.json")
        self.split = split
        self.ids = {domain: _read_ids(directory, f"{split}.{domain}") for domain in self.weights}
        for domain, ids in self.ids.items():
            if ids.max(initial=0) >= vocab_size:
                raise ValueError(f"{split}.{domain} holds id {ids.max()}; the model's vocabulary has {vocab_size}")

    def refuse_shorter(self, length: int) -> None:
        """Raises ValueError for a domain without a window of `length` tokens and the next."""
        for domain, ids in self.ids.items():
            if len(ids) <= length:
                raise ValueError(
                    f"domain {domain} has {len(ids)} tokens to {self.split}, a window needs {length + 1}; shorten "
                    "sequence_len, or give more text"
                )

    def batch(self, seed: int, step: int, size: int, length: int) -> np.ndarray:
        """int32 [size, length + 1]: the same for the same arguments."""
        rng = np.random.default_rng((seed, step))
        shares = np.array(list(self.weights.values()))
        domains = rng.choice(list(self.weights), size, p=shares / shares.sum())
        return np.stack([self.window(domain, rng, length) for domain in domains])

    def window(self, domain: str, rng: np.random.Generator, length: int) -> np.ndarray:
        ids = self.ids[domain]
        begin = rng.integers(0, len(ids) - length)
        return ids[begin : begin + length + 1].astype(np.int32)

    def windows(self, domain: str, length: int, count: int) -> np.ndarray:
        """int32 [count, length + 1]: always the same ones, those of `evaluate`."""
        rng = np.random.default_rng(7)
        return np.stack([self.window(domain, rng, length) for _ in range(count)])


def _meta(path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Weights and bytes per token by domain. Raises FileNotFoundError or ValueError, naming file and key."""
    if not path.exists():
        raise FileNotFoundError(f"{path} not found; grokscope.corpus.write makes such a folder of texts")
    try:
        meta = json.loads(path.read_text("utf-8"))
    except ValueError as err:  # neither JSON nor UTF-8
        raise ValueError(f"{path} is not JSON: {err}") from err
    found = []
    for key in ("weights", "bytes_per_token"):
        numbers = meta.get(key) if isinstance(meta, dict) else None
        if not isinstance(numbers, dict) or not numbers:
            raise ValueError(f'{path}: expected "{key}": {{domain: number, ...}}, found {numbers!r:.60}')
        for domain, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
                raise ValueError(f"{path}: {key} of {domain} is {number!r:.60}; expected a number from 0")
        found.append(numbers)
    weights, sizes = found
    if not any(weights.values()) or not all(sizes.values()):
        raise ValueError(f"{path}: expected a weight above 0, and bytes_per_token above 0 of each domain")
    if "mixture" in weights:
        raise ValueError(f"{path}: a domain is called mixture, as the mean of all is; name it otherwise")
    if missing := weights.keys() - sizes.keys():
        raise ValueError(f"{path}: bytes_per_token lacks {', '.join(sorted(missing))}")
    return weights, sizes


def _read_ids(directory: Path, name: str) -> np.ndarray:
    for ending, dtype in WIDTHS.items():
        path = directory / f"{name}.{ending}"
        packed = path.with_name(path.name + ".xz")
        if path.exists():
            found = path.read_bytes()
        elif packed.exists():
            try:
                found = lzma.decompress(packed.read_bytes())
            except lzma.LZMAError as err:
                raise ValueError(f"{packed} is not a whole xz file: {err}") from err
        else:
            continue
        if len(found) % dtype.itemsize:
            raise ValueError(f"{path} holds {len(found)} bytes: expected ids of {dtype.itemsize} bytes each")
        return np.frombuffer(found, dtype)
    raise FileNotFoundError(f"{directory} lacks {name}: expected {name}.u16 or .u32, or one of them as .xz")


def write(
    directory: Path | str, texts: Mapping[str, Iterable[str]], tokenizer: Tokenizer, config: GrokConfig,
    *, held_out: float = 0.05,
) -> None:  # fmt: skip
    """Texts by domain as data to train on. A domain weighs what it has of all tokens.

    Texts are put in an order that depends on their contents alone, one that occurs twice counts once, and the last
    `held_out` of a domain's tokens are for validation. Raises FileExistsError for a folder that holds anything;
    ValueError for a domain without text, or a name that is no file's; TypeError for what is not texts.
    """
    directory = Path(directory)
    if not isinstance(texts, Mapping) or not texts:
        raise TypeError(f'expected {{domain: texts}}, as {{"mine": texts}}; got {texts!r:.60}')
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"expected a Tokenizer, as grok.tokenizer is one; got {type(tokenizer).__name__}")
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not an empty folder; choose a new one, or delete it")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, more than the {config.vocab_size} ids of the model"
        )
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}: expected a share of the tokens, between 0 and 1")
    ids, sizes = {}, {}
    for domain, of_domain in texts.items():
        if Path(domain).name != domain or domain == "mixture":
            raise ValueError(f"domain {domain!r}: expected the name of a file, other than mixture")
        ids[domain], size = _tokens(domain, of_domain, tokenizer, config)
        sizes[domain] = size / len(ids[domain])
    directory.mkdir(parents=True, exist_ok=True)
    ending = _ending(config)
    for domain, of_domain in ids.items():
        begin = len(of_domain) - max(1, round(held_out * len(of_domain)))
        of_domain[:begin].tofile(directory / f"train.{domain}.{ending}")
        of_domain[begin:].tofile(directory / f"valid.{domain}.{ending}")
    total = sum(map(len, ids.values()))
    weights = {domain: len(of_domain) / total for domain, of_domain in ids.items()}
    (directory / "meta.json").write_text(json.dumps({"weights": weights, "bytes_per_token": sizes}, indent=1))


def _ending(config: GrokConfig) -> str:
    """That of files whose ids hold this vocabulary."""
    return "u16" if config.vocab_size <= 1 << 16 else "u32"


def _tokens(domain: str, texts: Iterable[str], tokenizer: Tokenizer, config: GrokConfig) -> tuple[np.ndarray, int]:
    """Ids [N] of the documents of a domain, one after the other, and the bytes of their texts."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"domain {domain!r}: expected texts")
    found = {text.encode("utf-8", "surrogatepass"): text for text in texts if text}  # the tokenizer tells of surrogates
    if not found:
        raise ValueError(f"domain {domain!r} has no text")
    bos, eos, dtype = [config.bos_token] * config.prompt_bos, [config.eos_token], WIDTHS[_ending(config)]
    order = sorted(found, key=lambda key: (zlib.crc32(key), key))
    return np.concatenate([np.array(bos + tokenizer.encode(found[key]) + eos, dtype) for key in order]), sum(
        map(len, found)
    )
