"""A model's words, and the original's beside them: what `compress generate` and `compress chat` print."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError

#: of a conversation: {"role": "user" or "assistant", "content": text}
Message = Mapping[str, str]
Told = Callable[[str], None]


@dataclass(frozen=True)
class Manner:
    """How words are chosen.

    Attributes:
        tokens: at most so many.
        temperature: 0 takes the likeliest token each time; else tokens are drawn.
        seed: of what is drawn.
    """

    tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise CompressError(f"{self.tokens} tokens are none", "--max-tokens", "use 1 or more")
        if self.temperature < 0:
            raise CompressError(f"{self.temperature:g} is below 0", "--temperature", "use 0 for the likeliest token")


@dataclass(frozen=True)
class Reply:
    """What a model said.

    Attributes:
        name: the model's.
        text: without the prompt.
        tokens: their ids, the end's among them.
        seconds: from the first of them to the last.
        ended: it came to an end by itself.
    """

    name: str
    text: str
    tokens: tuple[int, ...]
    seconds: float
    ended: bool

    @property
    def rate(self) -> float | None:
        """Tokens a second, without the first, before which the prompt is read; None where there is no second one."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 and self.seconds > 0 else None

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.name, "text": self.text, "tokens": list(self.tokens), "ended": self.ended,
            "tokens_per_second": None if self.rate is None else round(self.rate, 2),
        }  # fmt: skip


def alike(a: Reply, b: Reply) -> int:
    """How many tokens two replies begin with in common."""
    same = 0
    for mine, other in zip(a.tokens, b.tokens, strict=False):
        if mine != other:
            break
        same += 1
    return same


@dataclass
class Speaker:
    """A loaded model and its tokenizer.

    Attributes:
        name: the folder's.
        model: a transformers model; packed layers stay packed.
        tokenizer: its tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any
    _ends: frozenset[int] = field(default_factory=frozenset)

    @classmethod
    def load(cls, model: str, device: str | None, dtype: str, trust_remote_code: bool = False) -> Speaker:
        """Raises CompressError for anything a user can mend."""
        from compress.api import find_model, load_tokenizer
        from compress.loading import load

        folder = find_model(model)
        made = load(folder, device, dtype, trust_remote_code=trust_remote_code)
        ends = made.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        return cls(Path(model).name or model, made, load_tokenizer(folder, trust_remote_code), frozenset(ends))

    @property
    def talks(self) -> bool:
        """It was made for conversations: its tokenizer knows how to write one."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def continuing(self, text: str) -> Tensor:
        """int64 [1, tokens] of a text to go on with. Raises CompressError where it has none."""
        ids: Tensor = self.tokenizer(text, return_tensors="pt").input_ids
        return self._fitting(ids)

    def answering(self, messages: Sequence[Message]) -> Tensor:
        """int64 [1, tokens] of a conversation whose next turn is the model's."""
        ids = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True)
        ids = ids["input_ids"] if isinstance(ids, Mapping) else ids
        return self._fitting(torch.tensor(ids).reshape(1, -1))

    def _fitting(self, ids: Tensor) -> Tensor:
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if ids.shape[1] == 0:
            raise CompressError("holds no token", "the prompt", "write something for the model to go on with")
        if isinstance(longest, int) and ids.shape[1] >= longest:
            what = f"has {ids.shape[1]} tokens, the model's context is {longest}"
            raise CompressError(what, "the prompt", "shorten it, or begin a new conversation")
        return ids

    @torch.no_grad()
    def say(self, ids: Tensor, manner: Manner, told: Told = lambda piece: None) -> Reply:
        """Go on from int64 [1, tokens].

        Args:
            told: is called with each piece of the text as soon as it is there.
        """
        from transformers import GenerationConfig, TextStreamer

        class Stream(TextStreamer):  # type: ignore[misc]
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                told(text)

        times: list[float] = []

        def clock(_: Tensor, scores: Tensor) -> Tensor:
            times.append(time.perf_counter())
            return scores

        device = self.model.get_input_embeddings().weight.device
        ids = ids.to(device)
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = longest - ids.shape[1] if isinstance(longest, int) else manner.tokens
        own = self.model.generation_config
        settings = GenerationConfig(
            max_new_tokens=min(manner.tokens, room),
            do_sample=manner.temperature > 0,
            eos_token_id=own.eos_token_id,
            bos_token_id=own.bos_token_id,
            pad_token_id=own.pad_token_id if own.pad_token_id is not None else next(iter(sorted(self._ends)), None),
            **({"temperature": manner.temperature} if manner.temperature > 0 else {}),
        )
        torch.manual_seed(manner.seed)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            streamer=Stream(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            logits_processor=[clock],
        )
        new = out[0, ids.shape[1] :].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        seconds = time.perf_counter() - times[0] if times else 0.0
        return Reply(self.name, text, tuple(new), seconds, bool(new) and new[-1] in self._ends)

    def free(self) -> None:
        """Give its memory back."""
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def generate(
    models: Sequence[str],
    prompt: str,
    manner: Manner,
    conversation: bool = False,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    told: Callable[[str, str], None] = lambda model, piece: None,
) -> list[Reply]:
    """What each model makes of a prompt, one model in memory at a time.

    Args:
        models: folders or hub ids.
        conversation: the prompt is a user's turn; else it is a text to go on with.
        told: is called with a model's name and each piece of its text.

    Raises:
        CompressError: anything a user can mend.
    """
    replies = []
    for model in models:
        speaker = Speaker.load(model, device, dtype, trust_remote_code)
        if conversation and not speaker.talks:
            speaker.free()
            raise CompressError(
                "its tokenizer has no chat template", model, "leave out --chat: it goes on with the prompt as it is"
            )
        turn = {"role": "user", "content": prompt}
        ids = speaker.answering([turn]) if conversation else speaker.continuing(prompt)
        replies.append(speaker.say(ids, manner, partial(told, speaker.name)))
        speaker.free()
    return replies


def answer(
    speakers: Sequence[Speaker],
    said: Sequence[list[Message]],
    line: str,
    manner: Manner,
    told: Told = lambda piece: None,
) -> list[Reply]:
    """Every model's answer to a line, each in its own conversation, which goes on with both.

    Args:
        said: of each speaker, the conversation until now; without a chat template only the line counts.
        told: is called with the pieces of the first one's text.
    """
    replies = []
    for i, (speaker, messages) in enumerate(zip(speakers, said, strict=True)):
        turn = {"role": "user", "content": line}
        ids = speaker.answering([*messages, turn]) if speaker.talks else speaker.continuing(line)
        replies.append(speaker.say(ids, manner, told if i == 0 else lambda piece: None))
        messages += [turn, {"role": "assistant", "content": replies[-1].text}]
    return replies
