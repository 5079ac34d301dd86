"""Files of `compress eval`, and the figures that a run's own record holds: both -> Score. Absent keys are no fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint import read_json
from compress.errors import CompressError
from compress.evaluate.intervals import Estimate
from compress.report.html.facts import Score
from compress.report.html.tensors import number

#: of `compress eval --out`
SCHEMA = 1
OWN = "the run itself"
#: what `compress sweep` measured: its settings are models, otherwise as an evaluation
SWEEP = "sweep.json"


@dataclass(frozen=True)
class File:
    """One evaluation file."""

    path: Path
    values: dict[str, Any]

    @property
    def models(self) -> list[dict[str, Any]]:
        return [x for x in self.values.get("models") or () if isinstance(x, dict)]

    @property
    def base(self) -> dict[str, Any]:
        found = self.values.get("base")
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Entry:
    """What a file says of one model."""

    file: File
    values: dict[str, Any]


def read(path: Path) -> File:
    """An evaluation file. Raises CompressError for another one."""
    values = read_json(path, "pass a file that compress eval wrote")
    if values.get("kind") == "sweep":
        measured = [s for s in values.get("settings") or () if isinstance(s, dict) and not s.get("refused")]
        values |= {"kind": "evaluation", "models": measured}
    if values.get("kind") != "evaluation" or not isinstance(values.get("models"), list):
        raise CompressError("is not an evaluation", str(path), "pass a file that compress eval wrote")
    if values.get("schema") != SCHEMA:
        what = f"has schema {values.get('schema')!r}, this version reads {SCHEMA}"
        raise CompressError(what, str(path), "evaluate again, or use the compress that wrote it")
    return File(path, values)


def swept(folder: Path) -> list[Path]:
    """The checkpoints of a finished sweep. Raises CompressError when it kept none."""
    found = read_json(folder / SWEEP, "give the sweep's command again").get("settings")
    names = [str(s.get("name")) for s in found or () if isinstance(s, dict)]
    there = [folder / name for name in names if Path(name).name == name and (folder / name).is_dir()]
    if not there:
        what = f"the sweep kept none of {len(names)} checkpoints"
        raise CompressError(what, str(folder), "sweep without --discard")
    return there


def same(values: Mapping[str, Any], folder: Path) -> bool:
    """Whether an entry is about this folder: the same path; a relative one is matched by its last parts."""
    told = values.get("folder")
    if not isinstance(told, str) or not told:
        return values.get("name") == folder.name
    there = Path(told)
    if there.expanduser().resolve() == folder.resolve():
        return True
    return not there.exists() and there.name == folder.resolve().name


def entry(file: File, folder: Path, name: str) -> Entry | None:
    """What a file says of a folder; None if nothing."""
    found = [x for x in file.models if same(x, folder)]
    return Entry(file, found[0]) if found else None


def scores(record: Mapping[str, Any], entries: Sequence[Entry | None]) -> list[Score]:
    """Figures of a model on every text: those of evaluation files; where there are none, the run's own."""
    out = []
    for found in entries:
        if found is not None:
            texts = [x for x in found.values.get("texts") or () if isinstance(x, dict)]
            dtype = found.values.get("dtype")
            out += [_score({"dtype": dtype, **x}, _base_of(found.file, x), found.file.path.name) for x in texts]
    return out or _own(record)


def _base_of(file: File, text: Mapping[str, Any]) -> Mapping[str, Any]:
    """The original's figures on the same text."""
    texts = [x for x in file.base.get("texts") or () if isinstance(x, dict)]
    return next((x for x in texts if x.get("text") == text.get("text")), texts[0] if len(texts) == 1 else {})


def _score(text: Mapping[str, Any], base: Mapping[str, Any], measured: str) -> Score:
    kl = text.get("kl")
    kl = kl if isinstance(kl, Mapping) else {}
    flips = text.get("flips")
    flips = flips if isinstance(flips, Mapping) else {}
    share = estimate(flips.get("share")) or estimate(flips)
    turned = {"share": None if share is None else share.value} | {k: number(flips.get(k)) for k in ("lost", "gained")}
    tail = {k: number(kl.get(k)) for k in ("median", "p99", "p999", "max")}
    return Score(
        text=_text(text.get("text")),
        protocol=_protocol(text),
        measured=measured,
        perplexity=estimate(text.get("perplexity")),
        original=estimate(base.get("perplexity")) or estimate(text.get("original_perplexity")),
        kl=estimate(kl.get("mean")),
        kl_tail={k: v for k, v in tail.items() if v is not None},
        top1=estimate(text.get("top1")),
        flips={k: v for k, v in turned.items() if v is not None},
        bits_per_byte=estimate(text.get("bits_per_byte")),
    )


def _own(record: Mapping[str, Any]) -> list[Score]:
    """What the run measured when it was over."""
    found = record.get("evaluation")
    if not isinstance(found, Mapping):
        return []
    mine, base = found.get("compressed") or {}, found.get("original") or {}
    tail = {k: number(mine.get(f"kl_{k}")) for k in ("median", "p99", "p999", "max")}
    flips = {k: number(mine.get(k)) for k in ("lost", "gained")}
    about = {**found, **mine, "predictions": mine.get("tokens")}
    return [
        Score(
            text=_text(found.get("text")),
            protocol=_protocol(about),
            measured=OWN,
            perplexity=_flat(mine, "perplexity"),
            original=_flat(base, "perplexity"),
            kl=_flat(mine, "kl"),
            kl_tail={k: v for k, v in tail.items() if v is not None},
            top1=_flat(mine, "top1"),
            flips={k: v for k, v in flips.items() if v is not None},
            bits_per_byte=_flat(mine, "bits_per_byte"),
        )
    ]


def _text(value: Any) -> str:
    """A text's name; a path's last part."""
    name = str(value or "not recorded")
    return Path(name).name if Path(name).is_absolute() else name


def _protocol(values: Mapping[str, Any]) -> str:
    """ "the words of the protocol; 104 windows of 512 tokens, stride 512; 53,144 predictions"."""
    parts = [str(values["protocol"])] if values.get("protocol") else []
    windows, window, stride = (number(values.get(k)) for k in ("windows", "window", "stride"))
    if windows and window:
        overlap = f", {stride:g} tokens apart" if stride else ""
        parts.append(f"{windows:,.0f} windows of {window:,.0f} tokens{overlap}")
    predictions = number(values.get("predictions"))
    parts += [f"{predictions:,.0f} predictions"] if predictions else []
    parts += [str(values["bos"])] if values.get("bos") else []
    parts += [f"computed in {values['dtype']}"] if values.get("dtype") else []
    return "; ".join(parts) or "protocol not recorded"


def estimate(value: Any) -> Estimate | None:
    """A number, or {"value", "low", "high"}; None for what is neither."""
    if isinstance(value, Mapping):
        middle = number(value.get("value"))
        return None if middle is None else Estimate(middle, number(value.get("low")), number(value.get("high")))
    middle = number(value)
    return None if middle is None else Estimate(middle)


def _flat(values: Mapping[str, Any], name: str) -> Estimate | None:
    """A figure whose interval lies beside it as name_low and name_high."""
    middle = number(values.get(name))
    if middle is None:
        return None
    return Estimate(middle, number(values.get(f"{name}_low")), number(values.get(f"{name}_high")))
