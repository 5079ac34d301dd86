"""Where text comes from: a recipe in calib/, a local file, or a hub data set -> its documents, one at a time.

Nothing is tokenised here. Recipes pin a revision (keys: calib/README.md); data sets that the user names are
streamed, since they may be huge.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from compress import assets
from compress.errors import CompressError
from compress.textfiles import (
    SUFFIXES,
    Document,
    Documents,
    attempt,
    documents_of,
    import_datasets,
    pick,
    read_files,
    table,
)

STREAM_BUFFER = 1000  # documents held while a streamed data set is shuffled
_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[^:/]*)(:(?P<split>[^/]+))?)?")
_NO_HUB = "no hub access? pass a local file or --calib bundled"


@dataclass(frozen=True)
class TextSource:
    """Documents, and how they are meant to be read.

    `joined`: they are one text with `joiner` between them. `protocol` and `max_tokens` are for evaluation.
    """

    name: str  # for the report
    documents: Documents
    joined: bool = False
    joiner: str = "\n\n"
    notes: tuple[str, ...] = ()
    protocol: str = ""
    max_tokens: int | None = None


@dataclass(frozen=True)
class Recipe:
    """One calib/NAME.toml; the keys are explained in calib/README.md."""

    mode: str
    path: str | None = None
    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    data_files: str | None = None
    column: str = "text"
    joiner: str = "\n\n"
    documents: int | None = None
    max_tokens: int | None = None
    protocol: str = ""


def recipes() -> tuple[str, ...]:
    """The names of the recipes in calib/."""
    return tuple(sorted(file.stem for file in assets.folder("calib").glob("*.toml")))


def open_source(source: str, *, wanted: tuple[str, ...] = (), evaluation: bool = False) -> TextSource:
    """Find `source`: a recipe's name first, then a path, then a hub id `org/name[:config[:split]]`.

    Args:
        wanted: the columns to look for, the first one present is taken; none: the recipe's, else "text".
        evaluation: take the recipe's [eval] half; for a hub id, the split "test" instead of "train".

    Raises:
        CompressError: nothing of that name, unreadable, no such column, hub not reached, no `datasets`.
    """
    if source in recipes():
        return _from_recipe(source, wanted, evaluation)
    wanted = wanted or ("text",)
    if os.path.exists(source):
        documents, joined, notes = read_files(Path(source), wanted)
        return TextSource(source, documents, joined, notes=notes)
    if source.endswith(SUFFIXES) or source.startswith(("/", ".", "~")):
        raise CompressError("no such file or folder", source, "check the path")
    hub = _HUB_ID.fullmatch(source)
    if not hub:
        names = ", ".join(recipes()) + ("" if evaluation else ", self")
        what = "neither a recipe, nor a file or folder, nor a hub id like org/name"
        raise CompressError(what, source, f"the recipes are {names}")
    split = hub["split"] or ("test" if evaluation else "train")
    return _from_hub_id(hub["id"], hub["config"] or None, split, wanted)


def _from_recipe(name: str, wanted: tuple[str, ...], evaluation: bool) -> TextSource:
    with (assets.folder("calib") / f"{name}.toml").open("rb") as file:
        keys = tomllib.load(file)
    half = keys.pop("eval", None)
    if evaluation and half is None:
        raise CompressError("this recipe has no text to evaluate on", name, "use wikitext2, c4, ptb or bundled")
    recipe = Recipe(**keys | (half if evaluation else {}))
    wanted = wanted or (recipe.column,)
    found = _from_calib(name, recipe.path, wanted) if recipe.path else _from_pinned(name, recipe, wanted)
    return replace(
        found,
        joined=recipe.mode == "joined",
        joiner=recipe.joiner,
        protocol=recipe.protocol,
        max_tokens=recipe.max_tokens,
    )


def _from_calib(name: str, path: str, wanted: tuple[str, ...]) -> TextSource:
    file = assets.folder("calib") / path
    if not file.is_file():
        raise CompressError(f"the bundled text {path} is missing", name, "reinstall compress-llm")
    return TextSource(f"{name} ({path})", read_files(file, wanted)[0])


def _from_pinned(name: str, recipe: Recipe, wanted: tuple[str, ...]) -> TextSource:
    """A recipe's data set, downloaded whole (or one file of it) at its pinned revision."""
    label = f"{name} ({recipe.hub} @ {recipe.revision}, {recipe.split})"
    datasets = import_datasets(label)
    options: dict[str, Any] = {"name": recipe.config, "split": recipe.split, "revision": recipe.revision}
    if recipe.data_files:  # the sizes on record are those of the whole split, so they are not checked
        options |= {"data_files": {recipe.split: recipe.data_files}, "verification_mode": "no_checks"}
    data = attempt(lambda: datasets.load_dataset(recipe.hub, **options), label, _NO_HUB)
    revision = _cached_revision(data)
    notes: tuple[str, ...] = ()
    if revision not in (None, recipe.revision):
        notes = (f"NOT the pinned revision: hub not reached, the cache holds {revision}",)
    rows = documents_of([table(label, data, wanted)], wanted)

    def first(seed: int | None) -> Iterator[Document]:
        return islice(rows(seed), recipe.documents)

    return TextSource(label, first, notes=notes)


def _cached_revision(data: Any) -> str | None:
    """The commit a data set was prepared from: `datasets` names the folder in its cache after it.

    When the hub is not reached, `datasets` takes what the cache has, whatever revision was asked for.
    """
    folders = sorted({Path(file["filename"]).parent.name for file in data.cache_files})
    return next((folder for folder in folders if re.fullmatch("[0-9a-f]{40}", folder)), None)


def _from_hub_id(hub: str, config: str | None, split: str, wanted: tuple[str, ...]) -> TextSource:
    """A data set that the user named: streamed, or from the cache when HF_HUB_OFFLINE is set."""
    import huggingface_hub

    label = ":".join(part for part in (hub, config) if part)
    datasets = import_datasets(label)
    remedy = f"{_NO_HUB} (no file or folder here has this name); another config or split: {hub}:CONFIG:SPLIT"
    options: dict[str, Any] = {"name": config, "split": split}
    if huggingface_hub.is_offline_mode():
        data = attempt(lambda: datasets.load_dataset(hub, **options), label, remedy)
        label += f" @ {_cached_revision(data) or 'unknown revision'}, {split}"
        rows = documents_of([table(label, data, wanted)], wanted)
        return TextSource(label, rows, notes=("read from the cache, HF_HUB_OFFLINE is set",))
    revision = attempt(lambda: huggingface_hub.HfApi().dataset_info(hub, timeout=30).sha, label, remedy)
    options |= {"revision": revision, "streaming": True}
    stream = attempt(lambda: datasets.load_dataset(hub, **options), label, remedy)
    label += f" @ {revision}, {split}"

    def documents(seed: int | None) -> Iterator[Document]:
        shuffled = stream if seed is None else stream.shuffle(seed=seed, buffer_size=STREAM_BUFFER)
        rows, number = iter(shuffled), 0
        while (row := attempt(lambda: next(rows, None), label, remedy)) is not None:
            number += 1
            yield f"{label}, document {number} drawn", pick(label, row, wanted)

    note = f"streamed: documents are drawn from a buffer of {STREAM_BUFFER}, not from the whole data set"
    return TextSource(label, documents, notes=(note,))
