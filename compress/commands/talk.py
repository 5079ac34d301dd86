"""`compress generate` and `compress chat`."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Optional

import typer

from compress.commands.shared import Code, Device, Json

_Against = Annotated[Optional[str], typer.Option(help="the original: its words stand beside")]  # noqa: UP045
_Tokens = Annotated[int, typer.Option(help="at most so many")]
_Temperature = Annotated[float, typer.Option(help="0: the likeliest token each time; above: tokens are drawn")]
_Seed = Annotated[int, typer.Option(help="of what is drawn")]
_Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]


def generate_command(
    model: Annotated[str, typer.Argument(help="model folder, hub id, or 'bundled'")],
    prompt: Annotated[str, typer.Option(help="what to go on with; - reads it from the standard input")],
    against: _Against = None,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is a user's turn of a conversation")] = False,
    max_tokens: _Tokens = 64,
    temperature: _Temperature = 0.0,
    seed: _Seed = 0,
    device: Device = None,
    dtype: _Dtype = "auto",
    trust_remote_code: Code = False,
    as_json: Json = False,
) -> None:
    """What a model makes of a prompt, and the original beside it. One model is in memory at a time."""
    from compress import talk
    from compress.report import talk as screen

    text = sys.stdin.read() if prompt == "-" else prompt
    names = [model] if against is None else [against, model]
    streams = against is None and not as_json
    replies = talk.generate(
        names,
        text,
        talk.Manner(max_tokens, temperature, seed),
        chat,
        device,
        dtype,
        trust_remote_code,
        (lambda _, piece: screen.piece(piece)) if streams else (lambda *_: None),
    )
    if as_json:
        same = {} if against is None else {"tokens_alike": talk.alike(replies[0], replies[1])}
        print(json.dumps({"prompt": text, "replies": [r.as_json() for r in replies], **same}, indent=2))
    elif streams:
        screen.ending(replies[0])
    else:
        screen.beside(replies)


def chat_command(
    model: Annotated[str, typer.Argument(help="model folder, hub id, or 'bundled'")],
    against: _Against = None,
    max_tokens: _Tokens = 256,
    temperature: _Temperature = 0.0,
    seed: _Seed = 0,
    device: Device = None,
    dtype: _Dtype = "auto",
    trust_remote_code: Code = False,
) -> None:
    """A conversation with a model, and the same one with the original beside it. Both are in memory."""
    from compress import talk
    from compress.report import talk as screen

    manner = talk.Manner(max_tokens, temperature, seed)
    names = [model] if against is None else [against, model]
    speakers = [talk.Speaker.load(name, device, dtype, trust_remote_code) for name in names]
    screen.introduction(speakers)
    said: list[list[talk.Message]] = [[] for _ in speakers]
    while (line := screen.ask(not sys.stdin.isatty())) is not None:
        line = line.strip()
        if line == "/quit":
            break
        if line == "/new":
            said = [[] for _ in speakers]
        elif line:
            alone = len(speakers) == 1
            replies = talk.answer(speakers, said, line, manner, screen.piece if alone else lambda piece: None)
            if alone:
                screen.ending(replies[0])
            else:
                screen.beside(replies)
