"""Text -> token rows to calibrate on, and token sequences to measure perplexity on.

Frantar et al. 2023, GPTQ, section 5, and datautils.py of the reference code: C4 gives one random crop of each
of 128 random documents of at least 2048 tokens; WikiText-2 and PTB are one long text. Two differences, both
on purpose: windows of a long text do not overlap, and no document is used twice. `Rows.notes` says all of it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.textfiles import MAX_JOINED, chat_messages, plain_text, too_long
from compress.textsource import TextSource, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCAN = 64  # the search for long documents ends after this many times the tokens that are needed


@dataclass(frozen=True)
class Rows:
    """What one run calibrates on."""

    tokens: Tensor  # int64 [samples, seq_len]
    source: str  # "wikitext2 (Salesforce/wikitext @ <revision>, train)"
    notes: tuple[str, ...]  # for the report: how the rows were cut, BOS policy, what was skipped
    sha256: str  # of the tokens as little-endian int64: a resumed run compares it


@dataclass(frozen=True)
class EvalText:
    """One text to measure perplexity on; cutting it into windows is the evaluator's work."""

    tokens: Tensor  # int64 [n]
    source: str
    protocol: str  # what was joined how; printed beside the number
    bos: str  # whether the tokenizer put a BOS at the start
    notes: tuple[str, ...] = ()


def calibration_rows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    column: str | None = None,
    chat_template: bool = False,
    generate: Callable[[int, int, int], Tensor] | None = None,
) -> Rows:
    """Token rows from `source`; the same arguments give the same rows.

    Args:
        source: a recipe (calib/NAME.toml), "self", a .txt/.jsonl/.json/.parquet file or a folder of these, or
            a hub data set `org/name[:config[:split]]` (split "train" unless named). A recipe or "self" wins
            over a file of that name.
        samples, seq_len: the shape of the result, [samples, seq_len].
        seed: of every random choice.
        column: the column with the text; "text" unless the recipe says otherwise.
        chat_template: the column ("messages", else "conversations") holds lists of {"role", "content"}, which
            the tokenizer's chat template renders.
        generate: for "self": (samples, seq_len, seed) -> int64 [samples, seq_len], written by the model.

    Raises:
        CompressError: the source cannot be found or read, or holds too little text.
    """
    for name, value, least in (("samples", samples, 1), ("seq-len", seq_len, 1), ("seed", seed, 0)):
        if value < least:
            raise CompressError(f"{value} is too small", f"--{name}", f"use {least} or more")
    if source == "self":
        return _generated(generate, samples, seq_len, seed)
    reader = _Reader(tokenizer, chat_template)
    text = open_source(source, wanted=reader.wanted(column))
    if text.joined:
        rows, cut = _cut_joined(reader.joined(text), text.name, samples, seq_len, seed)
    else:
        rows, cut = _cut_documents(reader, text, samples, seq_len, seed)
    return _rows(torch.tensor(rows), text.name, (cut, *text.notes, *reader.policy, *reader.notes()))


def evaluation_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str | None = None,
    max_tokens: int | None = None,
) -> EvalText:
    """The text of a recipe's [eval] half, or all of a file or hub split (default "test"), tokenised once.

    Args:
        source, column: as for calibration_rows, without "self".
        max_tokens: keep only the first so many tokens; of many documents, only about as many are read.

    Raises:
        CompressError: as for calibration_rows, or the recipe has no text to evaluate on.
    """
    if max_tokens is not None and max_tokens < 1:
        raise CompressError(f"{max_tokens} is too small", "--max-tokens", "use 1 or more")
    reader = _Reader(tokenizer, chat=False)
    text = open_source(source, wanted=reader.wanted(column), evaluation=True)
    caps = [cap for cap in (text.max_tokens, max_tokens) if cap is not None]
    ids = reader.joined(text, min(caps, default=None))
    protocol = text.protocol or f"all of {text.name} joined by {text.joiner!r}, tokenised once"
    if max_tokens is not None and len(ids) == max_tokens:
        protocol += f"; only the first {max_tokens} tokens"
    notes = (*text.notes, *reader.notes())
    return EvalText(torch.tensor(ids), text.name, protocol, reader.policy[0], notes)


def _generated(generate: Callable[[int, int, int], Tensor] | None, samples: int, seq_len: int, seed: int) -> Rows:
    if generate is None:
        what = "no model here that could write the calibration text"
        raise CompressError(what, "self", "use --calib bundled, another recipe or a file")
    tokens = generate(samples, seq_len, seed)
    assert tokens.shape == (samples, seq_len), f"generate gave {tuple(tokens.shape)}"
    return _rows(tokens, "self", (f"{samples} rows written by the model itself, seed {seed}",))


def _rows(tokens: Tensor, source: str, notes: tuple[str, ...]) -> Rows:
    tokens = tokens.to("cpu", torch.int64).contiguous()
    return Rows(tokens, source, notes, hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest())


# --- documents -> tokens


@dataclass
class _Reader:
    """The tokenizer, and what it did: documents skipped, BOS and EOS seen."""

    tokenizer: Any
    chat: bool
    skipped: Counter[str] = field(default_factory=Counter)
    policy: tuple[str, ...] = ()  # once a text was seen: one line

    def __post_init__(self) -> None:
        if self.chat and not self.tokenizer.chat_template:
            raise CompressError("the tokenizer has no chat template", "--chat-template", "leave it out")

    def wanted(self, column: str | None) -> tuple[str, ...]:
        """The columns to look for; none: what the recipe says."""
        if column is not None:
            return (column,)
        return ("messages", "conversations") if self.chat else ()

    def notes(self) -> tuple[str, ...]:
        """How chats were read, and what was skipped."""
        chat = "chats rendered with the tokenizer's chat template, no other special tokens"
        skipped = (f"{count} documents skipped: {why}" for why, count in sorted(self.skipped.items()))
        return *([chat] if self.chat else []), *skipped

    def encode(self, text: str) -> list[int]:
        """Token ids with the tokenizer's own special tokens; a chat template has written them already."""
        special = {"add_special_tokens": False} if self.chat else {}
        ids: list[int] = self.tokenizer(text, verbose=False, **special)["input_ids"]
        return ids

    def observe(self, ids: Sequence[int], unit: str) -> None:
        """Keep, once, what the tokenizer really put at both ends of `unit`."""
        if self.policy:
            return
        name, bos, eos = self.tokenizer.bos_token, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None:
            said = "no BOS: the tokenizer has none"
        elif ids[0] == bos:
            said = f"one BOS ({name}) at the start of {unit}"
        else:
            said = f"no BOS: the tokenizer does not add its {name}"
        if eos is not None and len(ids) > 1 and ids[-1] == eos:
            said += f"; EOS ({self.tokenizer.eos_token}) at the end of {unit}"
        self.policy = (said,)

    def texts(self, source: TextSource, seed: int | None) -> Iterator[str]:
        """The documents as text; those that hold none are counted."""
        for where, value in source.documents(seed):
            if value is None:
                self.skipped["no value"] += 1
            elif (text := self._chat(where, value) if self.chat else plain_text(where, value)) is not None:
                yield text

    def _chat(self, where: str, value: object) -> str | None:
        from jinja2 import TemplateError

        messages = chat_messages(where, value)
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, TypeError, KeyError) as error:
            self.skipped[f"the chat template refuses them ({' '.join(str(error).split())[:100]})"] += 1
            return None

    def joined(self, source: TextSource, cap: int | None = None) -> list[int]:
        """All documents joined and tokenised once; with a cap, from not much more text than it takes."""
        parts: list[str] = []
        size, goal = 0, 2 * MAX_JOINED if cap is None else 8 * cap
        texts = self.texts(source, None)
        while True:
            for text in texts:
                parts.append(text)
                size += len(text)
                if size > MAX_JOINED:
                    raise too_long(source.name, size)
                if size >= goal:
                    break
            ended = size < goal
            joined = source.joiner.join(parts)
            ids = self.encode(joined) if joined.strip() else []
            if ended and not ids:
                raise CompressError("no text in it", source.name, "pass another text")
            if ended or (cap is not None and len(ids) >= cap + 16):  # 16: clear of the joint to the next text
                self.observe(ids[:cap], "the text")
                return ids[:cap]
            goal = 2 * size


# --- tokens -> rows


def _cut_joined(ids: list[int], name: str, samples: int, seq_len: int, seed: int) -> tuple[list[list[int]], str]:
    """Windows of one long text in ascending order: drawn by the seed, or overlapping if the text is short."""
    total, last = len(ids), len(ids) - seq_len
    if total >= samples * seq_len:
        windows = total // seq_len
        drawn = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples]
        starts = sorted(seq_len * window for window in drawn.tolist())
        note = f"{samples} of {windows} windows of {seq_len} tokens, none overlapping, seed {seed}"
    elif 2 * total >= samples * seq_len and last >= samples - 1 >= 1:
        starts = [last * i // (samples - 1) for i in range(samples)]
        shared = 1 - last / (samples - 1) / seq_len
        note = (
            f"windows overlap: the text has {total} tokens for {samples} rows of {seq_len}, so neighbours "
            f"share {shared:.0%} of theirs; the seed changes nothing"
        )
    else:
        fits = [f"--samples {total // seq_len}"] if total >= seq_len else []
        fits += [f"--seq-len {total // samples}"] if total >= samples else []
        raise _too_little(f"{total} tokens", name, samples, seq_len, fits)
    return [ids[start : start + seq_len] for start in starts], note


def _cut_documents(
    reader: _Reader, source: TextSource, samples: int, seq_len: int, seed: int
) -> tuple[list[list[int]], str]:
    """Random crops of long documents in seeded order; short ones, packed, stand in when there are too few."""
    generator = torch.Generator().manual_seed(seed)
    eos = reader.tokenizer.eos_token_id
    crops: list[list[int]] = []
    packed: list[int] = []  # short documents one after another, no more than may be needed
    lengths: list[int] = []
    scanned, need = 0, samples * seq_len
    for text in reader.texts(source, seed):
        ids = reader.encode(text) if text.strip() else []
        if not ids:
            reader.skipped["empty"] += 1
            continue
        reader.observe(ids, "each document")
        lengths.append(len(ids))
        scanned += len(ids)
        if len(ids) >= seq_len:
            start = int(torch.randint(len(ids) - seq_len + 1, (1,), generator=generator))
            crops.append(ids[start : start + seq_len])
        elif len(packed) < need:
            packed += ids if eos is None or ids[-1] == eos else [*ids, eos]
        if len(crops) == samples or (scanned > SCAN * need and len(packed) >= need):
            break
    note = f"{len(crops)} rows are random crops of one document each, none used twice, seed {seed}"
    if missing := samples - len(crops):
        if len(packed) < missing * seq_len:
            raise _too_few(lengths, source.name, samples, seq_len)
        crops += [packed[i * seq_len : (i + 1) * seq_len] for i in range(missing)]
        between = "nothing" if eos is None else f"EOS ({reader.tokenizer.eos_token})"
        note += f"; {missing} rows are shorter documents packed with {between} between, as too few are long"
    return crops, f"{note} ({len(lengths)} documents looked at)"


def _too_few(lengths: Sequence[int], name: str, samples: int, seq_len: int) -> CompressError:
    """The error for documents, all of which were looked at, so that what it proposes can be counted."""

    def rows(length: int) -> int:
        return sum(n >= length for n in lengths) + sum(n for n in lengths if n < length) // length

    if not lengths:
        return CompressError("no text in it", name, "pass another text")
    shorter = (seq_len >> i for i in range(1, seq_len.bit_length()))
    fits = [f"--samples {rows(seq_len)}"] if rows(seq_len) else []
    fits += next(([f"--seq-len {length}"] for length in shorter if rows(length) >= samples), [])
    fits += ["the documents as one .txt file"] if sum(lengths) >= samples * seq_len else []
    long = sum(n >= seq_len for n in lengths)
    found = f"{sum(lengths)} tokens in {len(lengths)} documents, {long} of them long enough for one row each"
    return _too_little(found, name, samples, seq_len, fits)


def _too_little(found: str, name: str, samples: int, seq_len: int, fits: Sequence[str]) -> CompressError:
    what = f"{found}; {samples} rows of {seq_len} need {samples * seq_len}"
    return CompressError(what, name, "use " + ", ".join([*fits, "--calib bundled or a longer text"]))
