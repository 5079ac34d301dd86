"""What a person sees of `compress generate` and `compress chat`: words as they come, and two models' side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from compress.talk import Reply, Speaker, alike

_PROMPT = "you> "


def piece(text: str) -> None:
    """A part of a reply, as soon as it is there."""
    print(text, end="", flush=True)


def heading(model: str) -> None:
    Console().print(f"[bold]{escape(model)}[/bold]")


def ending(reply: Reply) -> None:
    """Behind a reply whose words stand there already: how many, how fast."""
    print()
    Console().print(f"[dim]{_pace(reply)}[/dim]")


def beside(replies: Sequence[Reply]) -> None:
    """Replies in columns; what they begin with in common is dim in those behind the first."""
    table = Table(expand=True, show_lines=False)
    for reply in replies:
        table.add_column(reply.name, ratio=1, overflow="fold")
    first = replies[0]
    table.add_row(*[_marked(first, reply) if i else Text(reply.text) for i, reply in enumerate(replies)])
    table.add_row(*[Text(_pace(reply), style="dim") for reply in replies])
    console = Console()
    console.print(table)
    for reply in replies[1:]:
        console.print(Text(comparison(first, reply)))


def comparison(first: Reply, other: Reply) -> str:
    """One line: how long two replies agree."""
    same, least = alike(first, other), min(len(first.tokens), len(other.tokens))
    if same == len(first.tokens) == len(other.tokens):
        return f"{other.name} says the same as {first.name}, all {same} tokens"
    if same == least:
        return f"{other.name} and {first.name} say the same for {same} tokens, where one of them ends"
    return f"{other.name} and {first.name} say the same for {same} of {least} tokens"


def introduction(speakers: Sequence[Speaker]) -> None:
    """Before a conversation."""
    console = Console(stderr=True)
    names = " and ".join(s.name for s in speakers)
    console.print(f"[dim]{escape(names)}; /new begins anew, /quit ends (so does the end of the input)[/dim]")
    for speaker in speakers:
        if not speaker.talks:
            what = f"{speaker.name} has no chat template: it goes on with each line as it is and remembers nothing"
            console.print(f"[dim]{escape(what)}[/dim]")


def ask(quiet: bool) -> str | None:
    """A line of the user's; None at the end of the input. Nothing is printed where nobody types."""
    try:
        return input("" if quiet else _PROMPT)
    except EOFError:
        return None


def _marked(first: Reply, other: Reply) -> Text:
    same = 0
    for a, b in zip(first.text, other.text, strict=False):
        if a != b:
            break
        same += 1
    return Text.assemble((other.text[:same], "dim"), other.text[same:])


def _pace(reply: Reply) -> str:
    rate = "" if reply.rate is None else f", {reply.rate:.3g} a second"
    return f"{len(reply.tokens)} tokens{rate}{'' if reply.ended else '; not at its end'}"
