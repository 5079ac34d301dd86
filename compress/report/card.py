"""The model card: README.md with the metadata block that the hub reads, then what was done, for people.

The block's keys are those of the hub's model card metadata (huggingface_hub's ModelCardData writes it, so the quoting
is YAML's own). What a source's card says of licence, language and tags is carried over; whose base the model is only
where it is certain: a config's `_name_or_path` names what a fine-tuned model began with as well.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.formats import OWN

if TYPE_CHECKING:
    from compress.calibration import EvalText
    from compress.job import Job, Result

#: what must be installed for the load snippet, by format
_NEEDS = {
    "compressed-tensors": "transformers compressed-tensors accelerate",
    "gptq": "transformers gptqmodel optimum",
    "gptq_v2": "transformers gptqmodel optimum",
    "bitsandbytes": "transformers bitsandbytes accelerate",
    "gguf": "transformers gguf",
    "dense": "transformers",
}
#: what `textsource` calls a data set of the hub: "recipe (org/name @ revision, split)", "org/name:config @ ..."
_PINNED = re.compile(r"(\S+ \()?(?P<hub>[\w.-]+/[\w.-]+)(:(?P<config>\S+))? @ (?P<revision>\w+), (?P<split>[^,()]+)\)?")


def one_line(text: object) -> str:
    """A name or a note as it may stand in a line of Markdown: one line, no tags, no fences."""
    plain = " ".join(str(text).split())
    return plain.replace("<", "&lt;").replace("```", "'''")


def text_name(source: str) -> str:
    """What a text is called in public: of a path the last part."""
    return Path(source).name or source if Path(source).expanduser().exists() else source


def protocol(text: EvalText) -> str:
    """A text's protocol, by its public name."""
    return text.protocol.replace(text.source, text_name(text.source))


def hub_id(job: Job) -> str | None:
    """The source's id on the hub, None where it is not certain."""
    snapshot = job.source.parent
    if snapshot.name == "snapshots" and snapshot.parent.name.startswith("models--"):  # the hub's own cache
        return snapshot.parent.name.removeprefix("models--").replace("--", "/")
    named = job.origin.count("/") == 1 and not Path(job.origin).expanduser().exists()
    return job.origin if named else None


def source_card(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The metadata of a source's model card, and a note where it is damaged."""
    import yaml
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    if not card.is_file():
        return {}, None
    try:
        return metadata_load(card) or {}, None
    except (yaml.YAMLError, OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return {}, f"the source's README.md has no readable metadata, so no licence is carried over from it ({reason})"


def carried(data: Mapping[str, Any]) -> dict[str, Any]:
    """Licence, language and tags of a source's card: those that are text, or lists of it."""
    language = data.get("language")
    if isinstance(language, list):
        language = [_spoken(x) for x in language]
    found = {
        "license": data.get("license"),
        "license_name": data.get("license_name"),
        "license_link": data.get("license_link"),
        "language": _spoken(language),
        "tags": data.get("tags") or [],
    }
    return {k: v for k, v in found.items() if v and _is_text(v)}


def _spoken(value: Any) -> Any:
    """YAML 1.1 reads the code of Norwegian as a boolean."""
    return "no" if value is False else value


def _is_text(value: Any) -> bool:
    return all(isinstance(x, str) for x in value) if isinstance(value, list) else isinstance(value, str)


def metadata(result: Result, name: str) -> str:
    """The YAML of the metadata block, without its fences."""
    from huggingface_hub import ModelCardData

    job, plan = result.job, result.plan
    base = hub_id(job)
    known = carried(source_card(job.source)[0])
    given = known.pop("tags", [])
    evaluations = _evaluations(result)
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "quantized",
        **known,
        library_name="gguf" if plan.format.container == "gguf" else "transformers",
        pipeline_tag="text-generation",
        tags=[*([given] if isinstance(given, str) else given), *_tags(result)],
        model_name=name if evaluations else None,
        eval_results=evaluations or None,
    )
    return data.to_yaml()


def _tags(result: Result) -> list[str]:
    """The methods, the format as the hub knows it, and the bits where all layers have the same."""
    from compress.recipe import chained

    plan = result.plan
    storages = {chained(passes) for passes in plan.choice.values()}
    bits = {s.bits for s in storages}
    kinds = {s.kind for s in storages} | {s.inner.kind for s in storages if s.inner is not None}
    form = {"gptq_v2": "gptq", "dense": "", OWN: "compress"}.get(plan.format.name, plan.format.name)
    tags = ["compress", "quantized" if min(bits) < 16 else "", *(s.name for s in plan.recipe.steps if s.name != "keep")]
    tags += [form, f"{bits.pop()}-bit" if len(bits) == 1 and min(bits) < 16 else "", "sparse" * ("sparse" in kinds)]
    return [tag for tag in dict.fromkeys(tags) if tag]


def _evaluations(result: Result) -> list[Any]:
    """The run's figures as the hub's EvalResult; a figure that JSON cannot hold is left out."""
    from huggingface_hub import EvalResult

    score, text = result.score, result.job.text
    if score is None or text is None:
        return []
    pinned = _PINNED.fullmatch(text.source)
    where = pinned.groupdict() if pinned else {}
    figures = {
        "perplexity": ("perplexity", score.perplexity),
        "kl_divergence": ("KL divergence from the original, nats a token", score.kl),
        "top1_agreement": ("share of tokens with the original's most likely one", score.top1),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=where.get("hub", "text"),
            dataset_name=one_line(text_name(text.source)),
            dataset_config=where.get("config"),
            dataset_split=where.get("split"),
            dataset_revision=where.get("revision"),
            dataset_args={
                "protocol": protocol(text),
                "windows": score.windows,
                "window": score.window,
                "bos": text.bos,
            },
            metric_type=kind,
            metric_name=name,
            metric_value=value,
            verified=False,
        )
        for kind, (name, value) in figures.items()
        if value is not None and math.isfinite(value)
    ]


def load_snippet(format: str, name: str, gguf_file: str | None = None) -> str:
    """How the folder is loaded, as Markdown.

    Args:
        format: a name in the FORMATS table.
        name: the folder, or the repository it is pushed to.
        gguf_file: the weights' file name, of a GGUF folder.
    """
    given = [repr(name)]  # a Python string, whatever the name holds
    first = []
    if format == OWN:
        first = ["import compress  # lets transformers read this format"]
    if gguf_file is not None:
        given.append(f"gguf_file={gguf_file!r}")
    lines = [
        f"# pip install {_NEEDS.get(format, 'compress-llm')}",
        *first,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({given[0]})",
        f"model = AutoModelForCausalLM.from_pretrained({', '.join(given)})",
    ]
    out = ["```python", *lines, "```"]
    if format == OWN:
        out += ["", "and on the command line:", "", "```sh", f"compress eval {shlex.quote(name)}", "```"]
    if gguf_file is not None:
        out += ["", "or with llama.cpp:", "", "```sh", f"llama-cli -m {shlex.quote(gguf_file)}", "```"]
    return "\n".join(" ".join(line.splitlines()) for line in out)
