"""talk.py: words are the model's own, stream as they come, and two models' are compared token by token."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import cli, talk
from compress.errors import CompressError
from compress.report import talk as screen
from compress.talk import Manner, Reply, Speaker, alike

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line in this process, and its exit code."""

    def call(*args: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    return call


def reply(*tokens: int, text: str = "", name: str = "m") -> Reply:
    return Reply(name, text, tokens, 0.5, False)


@pytest.fixture(scope="module")
def packed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("talk") / "packed"
    compress.run(toy, compress.RTN(bits=2, group_size=32), out, no_eval=True)
    return out


def test_greedy_words_are_those_of_the_plain_model(toy: Path) -> None:
    from transformers import AutoModelForCausalLM

    told: list[tuple[str, str]] = []
    (found,) = talk.generate([str(toy)], "some words to", Manner(12), told=lambda m, p: told.append((m, p)))
    model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32)
    tokenizer = compress.api.load_tokenizer(toy)
    ids = tokenizer("some words to", return_tensors="pt").input_ids
    for token in found.tokens:
        with torch.no_grad():
            assert int(model(ids).logits[0, -1].argmax()) == token
        ids = torch.cat((ids, torch.tensor([[token]])), 1)
    assert found.text == tokenizer.decode(found.tokens, skip_special_tokens=True)
    assert "".join(p for _, p in told) == found.text
    assert {m for m, _ in told} == {toy.name}
    assert len(found.tokens) == 12 or found.ended


def test_drawn_words_depend_on_the_seed_alone(toy: Path) -> None:
    def words(seed: int) -> tuple[int, ...]:
        return talk.generate([str(toy)], "some", Manner(16, 1.5, seed))[0].tokens

    assert words(1) == words(1)
    assert len({words(seed) for seed in range(4)}) > 1


def test_two_models_side_by_side(toy: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = talk.generate([str(toy), str(packed)], "some words", Manner(6))
    assert 0 <= alike(first, other) <= 6
    screen.beside([first, other])
    out = capsys.readouterr().out
    assert toy.name in out
    assert "packed" in out


@pytest.mark.parametrize(
    ("a", "b", "same", "says"),
    [
        ((1, 2, 3), (1, 2, 3), 3, "the same as a, all 3 tokens"),
        ((1, 2, 3), (1, 5, 3), 1, "the same for 1 of 3 tokens"),
        ((1, 2), (1, 2, 3), 2, "for 2 tokens, where one of them ends"),
        ((), (4,), 0, "for 0 tokens, where"),
    ],
)
def test_how_far_two_agree(a: tuple[int, ...], b: tuple[int, ...], same: int, says: str) -> None:
    first, other = reply(*a, name="a"), reply(*b, name="b")
    assert alike(first, other) == same
    assert says in screen.comparison(first, other)


def test_a_conversation_goes_on(toy: Path) -> None:
    speaker = Speaker.load(str(toy), "cpu", "auto")
    assert not speaker.talks
    speaker.tokenizer.chat_template = TEMPLATE
    said: list[list[talk.Message]] = [[]]
    talk.answer([speaker], said, "one", Manner(3))
    before = speaker.answering([*said[0], {"role": "user", "content": "two"}])
    (second,) = talk.answer([speaker], said, "two", Manner(3))
    assert second.tokens == speaker.say(before, Manner(3)).tokens
    assert [m["role"] for m in said[0]] == ["user", "assistant"] * 2


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda toy: Manner(0), "0 tokens are none"),
        (lambda toy: Manner(1, -1), "-1 is below 0"),
        (lambda toy: talk.generate([toy], "", Manner()), "holds no token"),
        (lambda toy: talk.generate([toy], "word " * 3000, Manner()), "the model's context is"),
        (lambda toy: talk.generate([toy], "hello", Manner(), conversation=True), "no chat template"),
        (lambda toy: talk.generate(["/nowhere"], "hello", Manner()), "no such folder"),
    ],
)
def test_what_a_user_did_wrong(toy: Path, call: Any, says: str) -> None:
    with pytest.raises(CompressError, match=says):
        call(str(toy))


def test_generate_on_the_command_line(here: Any, toy: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here("generate", toy, "--prompt", "some words", "--against", packed, "--max-tokens", 4, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["model"] for r in found["replies"]] == ["packed", toy.name]
    assert found["tokens_alike"] <= 4
    assert here("generate", toy, "--prompt", "some words", "--max-tokens", 4) == 0
    assert "4 tokens" in capsys.readouterr().out


def test_chat_on_the_command_line(
    here: Any, toy: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("some words\n\n/new\nmore words\n/quit\nnot read\n"))
    assert here("chat", toy, "--against", packed, "--max-tokens", 3) == 0
    out = capsys.readouterr()
    assert out.out.count("say the same for") + out.out.count("says the same") == 2
    assert "has no chat template" in " ".join(out.err.split())
