"""A text to evaluate on, by the name of its protocol, with the bytes that each of its tokens stands for.

Names are those of recipes in calib/ (their [eval] half is the protocol), files, folders and hub data sets. The GPTQ
papers measured PTB and C4 in two ways, and both have a name:

    wikitext2            the test split joined by blank lines
    ptb-new = ptb        the test split joined by spaces (`--new-eval` in GPTQ's code, the tables of its camera-ready)
    ptb-old              the validation split joined by blank lines (GPTQ's code without that option)
    c4-new = c4          the first 1100 documents of a validation shard joined by spaces, its first 256 * 2048 tokens
    c4-old               256 random crops of one window each, of documents long enough, drawn by Python's random
                         module from seed 0 (GPTQ's code without that option)
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress import assets
from compress.calibration import EvalText, evaluation_tokens
from compress.errors import CompressError
from compress.textfiles import plain_text
from compress.textsource import open_source, recipes

_CROPS = 256


@dataclass(frozen=True)
class Text(EvalText):
    """An `EvalText` and what bits per byte need.

    Attributes:
        sizes: int64 [n], UTF-8 bytes of the text from the end of the token before to the end of each: 0 for special
            tokens, and for all but the last of several tokens that make one character. None where they are not known.
        crops: the tokens are so many pieces of different documents, one window each; 0 for one text.
    """

    sizes: Tensor | None = None
    crops: int = 0


def sizes_of(text: EvalText) -> Tensor | None:
    """int64 [n]: bytes of each token, None where they are not known."""
    return text.sizes if isinstance(text, Text) else None


def read_text(source: str, tokenizer: Any, window: int, column: str | None = None) -> Text:
    """A text, tokenised once.

    Args:
        source: a protocol's name, a file, a folder or a hub data set.
        window: tokens a crop, where the protocol takes crops.

    Raises:
        CompressError: it cannot be found or read, or holds too little text.
    """
    measuring = _Measuring(tokenizer)
    if _cropped(source):
        return _crops(source, measuring, window)
    found = evaluation_tokens(source, measuring, column=column)
    sizes, notes = measuring.sizes, found.notes
    if sizes is None:
        notes = (*notes, "no bits per byte: the tokenizer does not tell where its tokens lie in the text")
    else:
        sizes = sizes[: len(found.tokens)]
    return Text(found.tokens, found.source, found.protocol, found.bos, notes, sizes)


class _Measuring:
    """A tokenizer that keeps how many bytes the tokens of the last text stand for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.sizes: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        if not getattr(self._tokenizer, "is_fast", False):
            return self._tokenizer(text, **options)
        found = self._tokenizer(text, return_offsets_mapping=True, **options)
        self.sizes = token_bytes(text, found["offset_mapping"])
        return found


def token_bytes(text: str, offsets: list[tuple[int, int]]) -> Tensor:
    """int64 [tokens]: UTF-8 bytes of the text between the ends of one token and the next.

    Args:
        offsets: characters (begin, end) of each token; (0, 0) of special ones.
    """
    ends = torch.tensor([end for _, end in offsets], dtype=torch.int64)
    ends = torch.cummax(ends, 0).values if len(ends) else ends
    if text.isascii():
        places = ends
    else:
        points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
        width = 1 + (points > 0x7F).long() + (points > 0x7FF).long() + (points > 0xFFFF).long()
        places = torch.cat([torch.zeros(1, dtype=torch.int64), width.cumsum(0)])[ends]
    return places.diff(prepend=torch.zeros(1, dtype=torch.int64))


def _cropped(source: str) -> bool:
    """Whether a recipe's protocol takes crops of documents."""
    if source not in recipes():
        return False
    with (assets.folder("calib") / f"{source}.toml").open("rb") as file:
        return bool(tomllib.load(file).get("eval", {}).get("mode") == "documents")


def _crops(source: str, tokenizer: _Measuring, window: int) -> Text:
    """GPTQ's get_c4: draw a document until one is longer than a window, then where its crop begins; 256 times."""
    opened = open_source(source, evaluation=True)
    documents = [plain_text(where, value) for where, value in opened.documents(None) if value is not None]
    drawing = random.Random(0)
    tokens: list[Tensor] = []
    sizes: list[Tensor] = []
    short: set[int] = set()  # documents that were drawn and are not long enough
    while len(tokens) < _CROPS:
        if len(short) == len(documents):
            what = f"none of {len(documents)} documents has more than {window} tokens"
            raise CompressError(what, source, "use a smaller --window")
        drawn = drawing.randint(0, len(documents) - 1)
        ids = [] if drawn in short else tokenizer(documents[drawn], verbose=False)["input_ids"]
        if len(ids) <= window:
            short.add(drawn)
            continue
        begin = drawing.randint(0, len(ids) - window - 1)
        tokens.append(torch.tensor(ids[begin : begin + window]))
        if tokenizer.sizes is not None:
            sizes.append(tokenizer.sizes[begin : begin + window])
    protocol = f"{opened.protocol}, {window} tokens each"
    held = torch.cat(sizes) if len(sizes) == _CROPS else None
    bos = "as the tokenizer puts it at the start of a document, so in few crops"
    return Text(torch.cat(tokens), opened.name, protocol, bos, opened.notes, held, _CROPS)
