"""`compress eval`: several models on several texts against one original, and tasks. The result is plain values, which
report/evaluation.py describes and shows.

What can be refused is refused before anything runs: models of another vocabulary than the original's, texts that are
too short, tasks that nobody knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.ahead import Timed
from compress.assets import folder as assets
from compress.errors import CompressError
from compress.evaluate import tasks as harness
from compress.evaluate.figures import all_figures
from compress.evaluate.measure import Setting, measure
from compress.evaluate.states import Cache, Step
from compress.evaluate.texts import Text, read_text
from compress.evaluate.windows import WINDOW, Windows, make_windows
from compress.inventory import inventory
from compress.weights import Weights

_PROBE = 20000  # characters by which tokenizers are compared, beside their vocabularies


@dataclass
class Subject:
    """A model to evaluate.

    Attributes:
        name: what the user called it.
        context: tokens that it takes at most; None when its config names none.
        vocabulary: rows of its embeddings.
        dtype: in which it runs.
    """

    name: str
    folder: Path
    weights: Weights
    tokenizer: Any
    context: int | None
    vocabulary: int
    dtype: torch.dtype
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = inventory(self.folder).as_json()
        self.record = {
            "name": self.name,
            "folder": str(self.folder),
            "format": found["format"],
            "bytes": found["bytes"],
            "average_bits": found["packed_bits_per_weight"],
            "dtype": str(self.dtype).removeprefix("torch."),
            "texts": [],
        }

    def language(self) -> str:
        """sha256 of its vocabulary and of how it cuts a probe."""
        probe = (assets("calib") / "text" / "heldout.txt").read_text(encoding="utf-8")[:_PROBE]
        words = [sorted(self.tokenizer.get_vocab().items()), self.tokenizer(probe)["input_ids"]]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()


@dataclass(frozen=True)
class Asked:
    """What to tell of them; see `compress eval --help`. `most`: windows of a text; `cache`: None for none."""

    texts: tuple[str, ...]
    window: int | None = None
    stride: int | None = None
    most: int | None = None
    layers: bool = False
    tasks: tuple[str, ...] = ()
    device: torch.device = torch.device("cpu")
    trust_remote_code: bool = False
    low_memory: bool = False
    cache: Cache | None = None


def evaluate_all(
    models: Sequence[Subject], base: Subject | None, asked: Asked, step: Step, clock: Callable[[str], Any]
) -> dict[str, Any]:
    """Everything that was asked, as the schema in report/evaluation.py says, less its head.

    Raises:
        CompressError: anything a user can mend.
    """
    if base is not None:
        for model in models:
            check_comparable(model, base)
    elif asked.layers:
        raise CompressError("no original to tell the distance from", "--layers", "add --against ORIGINAL")
    window, notes = common_window([*models, *([base] if base else [])], asked.window)
    known = harness.find(asked.tasks) if asked.tasks else None
    with clock("text"):
        prepared = [
            (group, [_prepared(name, group[0], window, asked) for name in asked.texts])
            for group in groups(models, base)
        ]
    for group, texts in prepared:
        for number, (name, text, windows) in enumerate(texts):
            part = f"{name}: " if len(asked.texts) > 1 else ""
            told = _measure(group, base, asked, name, text, windows, asked.layers and number == 0, step, clock)
            notes += [part + note for note in told if part + note not in notes]
    if asked.layers and len(asked.texts) > 1:
        notes.append(f"errors of layers and blocks are on {asked.texts[0]}")
    if known is not None:
        for subject in [*([base] if base else []), *models]:
            with clock("tasks"):
                subject.record["tasks"] = harness.run(
                    known, subject.folder, subject.tokenizer, asked.device, subject.dtype, asked.trust_remote_code
                )
    return {
        "kind": "evaluation",
        "base": None if base is None else base.record,
        "models": [model.record for model in models],
        "notes": notes,
    }


def check_comparable(model: Subject, base: Subject) -> None:
    """Raise CompressError unless both give probabilities to the same tokens."""
    remedy = "compare models of one tokenizer; without --against, bits per byte compares any"
    if model.vocabulary != base.vocabulary:
        what = f"its vocabulary has {model.vocabulary} entries, that of {base.name} {base.vocabulary}"
        raise CompressError(what, model.name, remedy)
    if model.language() != base.language():
        mine, other = model.tokenizer.get_vocab(), base.tokenizer.get_vocab()
        apart = sum(other.get(token) != i for token, i in mine.items())
        how = f"{apart} of its {len(mine)} entries differ" if apart else "it cuts a text in another way"
        raise CompressError(f"its tokenizer is not that of {base.name}: {how}", model.name, remedy)


def common_window(subjects: Sequence[Subject], wanted: int | None) -> tuple[int, list[str]]:
    """Tokens a window, which all models must take, and a note where one of them cut it.

    Raises:
        CompressError: more than a model takes, fewer than two.
    """
    known = [(subject.context, subject.name) for subject in subjects if subject.context is not None]
    longest, name = min(known, default=(None, ""))
    if wanted is None:
        window = min(WINDOW, longest or WINDOW)
        others = len({context for context, _ in known}) > 1 and window == longest
        return window, [f"windows of {window} tokens, the context of {name}"] if others else []
    if not 2 <= wanted <= (longest or wanted):
        what = f"{wanted} tokens a window are out of range"
        raise CompressError(what, "--window", f"use 2 to {longest or 'the context length'}")
    return wanted, []


def groups(models: Sequence[Subject], base: Subject | None) -> list[list[Subject]]:
    """Models that share their tokens, and so their windows: all of them when they are compared with an original."""
    if base is not None or len(models) == 1:
        return [list(models)]
    found: dict[tuple[str, torch.dtype], list[Subject]] = {}
    for model in models:
        found.setdefault((model.language(), model.dtype), []).append(model)
    return list(found.values())


def _prepared(name: str, subject: Subject, window: int, asked: Asked) -> tuple[str, Text, Windows]:
    """A text in a model's tokens, and its windows."""
    text = read_text(name, subject.tokenizer, window)
    if text.crops and asked.stride is not None:
        what = f"{name} is {text.crops} crops of different documents: no window reaches from one into the next"
        raise CompressError(what, "--stride", "leave it out, or take a text in one piece, such as c4-new")
    return name, text, make_windows(text.tokens, window, asked.stride, asked.most)


def _measure(
    group: Sequence[Subject],
    base: Subject | None,
    asked: Asked,
    name: str,
    text: Text,
    windows: Windows,
    layers: bool,
    step: Step,
    clock: Timed,
) -> list[str]:
    """All models of a group on one text; their figures go into their records. Returns notes."""
    setting = Setting(asked.device, group[0].dtype, asked.trust_remote_code, asked.low_memory)
    original = None if base is None else base.weights
    found = measure(
        [subject.weights for subject in group], original, windows, setting, step, asked.cache, layers, clock
    )
    with clock("figures"):
        own, scores, narrow = all_figures(found.base, found.models, windows, text.sizes)
    head = {"text": text.source, "name": name, "protocol": text.protocol, "bos": text.bos}
    if base is not None and own is not None:
        base.record["texts"].append(head | own.as_json())
    for subject, score in zip(group, scores, strict=True):
        subject.record["texts"].append(head | score.as_json())
    for subject, distances in zip(group, found.distances, strict=False):
        subject.record |= distances.as_json()
    return [*text.notes, *found.notes, *([narrow] if narrow else [])]
