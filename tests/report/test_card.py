"""The model card: what the hub's own parser reads from it, what is carried over, and that no text breaks out of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load

import compress
from compress import pipeline
from compress.api import make_job
from compress.formats import FORMATS
from compress.job import Job
from compress.options import Options
from compress.passes.rtn import RTN
from compress.recipe import Recipe
from compress.report import card


@pytest.fixture(scope="session")
def text_file(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few windows: what its figures are is of no interest here."""
    short = tmp_path_factory.mktemp("short") / "text.txt"
    short.write_text(text_file.read_text()[:3000])
    return short


@pytest.fixture
def source(toy: Path, tmp_path: Path) -> Path:
    """A copy of the toy whose card can be written."""
    return Path(shutil.copytree(toy, tmp_path / "model"))


def run(source: Path, out: Path, text: Path | None = None, method: Any = None, **options: Any) -> Any:
    asked = {"no_eval": True} if text is None else {"eval": str(text)}
    return compress.run(source, method or RTN(group_size=32), out, device="cpu", **asked, **options)


def front(folder: Path) -> dict[str, Any]:
    found = metadata_load(folder / "README.md")
    assert found is not None
    return found


def test_the_hubs_parser_reads_the_runs_own_figures(source: Path, text_file: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "out", text_file)
    read = ModelCard.load(tmp_path / "out" / "README.md")
    assert read.data.library_name == "transformers"
    assert read.data.pipeline_tag == "text-generation"
    assert read.data.model_name == "out"
    assert {"compress", "quantized", "rtn", "compressed-tensors", "4-bit"} <= set(read.data.tags)
    figures = {r.metric_type: r for r in read.data.eval_results}
    score = result.score
    assert {k: r.metric_value for k, r in figures.items()} == {
        "perplexity": score.perplexity,
        "kl_divergence": score.kl,
        "top1_agreement": score.top1,
    }
    for entry in figures.values():
        assert entry.task_type == "text-generation"
        assert entry.verified is False
        assert (entry.dataset_type, entry.dataset_name) == ("text", text_file.name)
        assert entry.dataset_args["windows"] == score.windows
    record = json.loads((tmp_path / "out" / "compress.json").read_text())["evaluation"]["compressed"]
    assert record["perplexity"] == figures["perplexity"].metric_value
    for file in ("README.md", "compress.json"):
        assert str(text_file.parent) not in (tmp_path / "out" / file).read_text()  # no path of this machine
    model_index = front(tmp_path / "out")["model-index"]
    assert [m["type"] for m in model_index[0]["results"][0]["metrics"]] == list(figures)
    assert ModelCard(str(read)).data.to_dict() == read.data.to_dict()


def test_without_evaluation_there_is_no_model_index(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    found = front(tmp_path / "out")
    assert "model-index" not in found
    assert "model_name" not in found
    assert "base_model" not in found  # a folder's origin is not known
    assert "license" not in found


CARRIED = [
    ("license: mit", {"license": "mit"}),
    ("license: other\nlicense_name: llama3.2\nlicense_link: LICENSE", {
        "license": "other", "license_name": "llama3.2", "license_link": "LICENSE"}),
    ("license: [apache-2.0, mit]", {"license": ["apache-2.0", "mit"]}),
    ("license: {a: b}", {}),
    ("license: 7", {}),
    ("license:", {}),
    ("language: [en, no]", {"language": ["en", "no"]}),
    ("language: no", {"language": "no"}),
    ("language: de\nbase_model: org/other\nbase_model_relation: finetune", {"language": "de"}),
    ("model-index: 5\nlicense: mit", {"license": "mit"}),
]  # fmt: skip


@pytest.mark.parametrize(("block", "expected"), CARRIED, ids=[c[0][:30] for c in CARRIED])
def test_what_is_carried_over(source: Path, tmp_path: Path, block: str, expected: dict[str, Any]) -> None:
    (source / "README.md").write_text(f"---\n{block}\n---\n# The model\n")
    (source / "LICENSE").write_text("the terms\n")
    (source / "NOTICE").write_text("the notice\n")
    run(source, tmp_path / "out")
    found = front(tmp_path / "out")
    keys = ("license", "license_name", "license_link", "language", "base_model", "base_model_relation")
    assert {k: found[k] for k in keys if k in found} == expected
    assert (tmp_path / "out" / "LICENSE").read_text() == "the terms\n"
    assert (tmp_path / "out" / "NOTICE").read_text() == "the notice\n"


def test_tags_of_the_source_come_first(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\ntags: [chat, 4-bit]\n---\n")
    run(source, tmp_path / "out")
    assert front(tmp_path / "out")["tags"] == ["chat", "4-bit", "compress", "quantized", "rtn", "compressed-tensors"]


DAMAGED = {
    "not YAML": b"---\nlicense: [mit\n---\n",
    "not UTF-8": b"---\nlicense: \xff\xfe\n---\n",
    "a list": b"---\n- mit\n---\n",
    "a tag of Python": b"---\nlicense: !!python/object/apply:os.system [echo]\n---\n",
    "a huge number": b"---\nlicense: " + b"1" * 5000 + b"\n---\n",
    "too deep": b"---\nlicense: " + b"[" * 5000 + b"\n---\n",
    "no such day": b"---\nlicense: 2026-99-99\n---\n",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_card_is_noted_and_breaks_nothing(source: Path, tmp_path: Path, case: str) -> None:
    (source / "README.md").write_bytes(DAMAGED[case])
    run(source, tmp_path / "out")
    assert "license" not in front(tmp_path / "out")
    assert "no readable metadata" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("content", [b"", b"# Only a title\n", b"---\nnever closed\n", b"---\n---\n"])
def test_a_card_without_metadata(source: Path, tmp_path: Path, content: bytes) -> None:
    (source / "README.md").write_bytes(content)
    assert card.source_card(source) == ({}, None)


EVIL = [
    'a "quoted" name',
    "it's --- a trap",
    "first\n---\nlicense: evil",
    "x\n\n```\n<script>alert(1)</script>",
    "{{ 7 * 7 }} {% raw %}",
    "key: value # comment",
    "- item",
    "back\\slash",
    "\u2028line\u0085ends\x0b",
    "no",
    "1e5",
]


@pytest.mark.parametrize("name", EVIL)
def test_no_name_breaks_out(source: Path, text_file: Path, tmp_path: Path, name: str) -> None:
    """The title, and what a stranger's card says of its licence and tags."""
    evil = json.dumps(name)
    (source / "README.md").write_text(f"---\nlicense_name: {evil}\ntags: [{evil}]\nlanguage: [{evil}]\n---\n")
    out = tmp_path / name.replace("/", "|")
    run(source, out, text_file)
    found = front(out)
    allowed = {"language", "library_name", "license_name", "pipeline_tag", "tags", "model-index"}
    assert set(found) == allowed
    assert found["license_name"] == name
    assert found["tags"][0] == name
    assert found["model-index"][0]["name"] == " ".join(out.name.split()).replace("<", "&lt;").replace("```", "'''")
    body = (out / "README.md").read_text().partition("\n---\n\n# ")[2]
    title, rest = body.split("\n", 1)
    assert "<script" not in title
    assert "49" not in title
    assert rest.startswith("\nmodel compressed with `rtn`")
    assert body.count("\n```") == 4  # the recipe's fence and the snippet's
    code = body.rpartition("```python\n")[2].rpartition("\n```")[0]
    calls: list[str] = []
    loader = type("Loader", (), {"from_pretrained": staticmethod(calls.append)})
    source_lines = "\n".join(line for line in code.splitlines() if not line.startswith("from "))
    exec(source_lines, {"AutoTokenizer": loader, "AutoModelForCausalLM": loader})  # its own snippet, from this test
    assert calls == [out.name] * 2


@pytest.mark.parametrize(
    ("origin", "source", "expected"),
    [
        ("org/name", "/data/model", "org/name"),
        ("name", "/data/name", None),
        ("gpt2", "/cache/models--gpt2/snapshots/0123", "gpt2"),
        ("0123", "/cache/models--org--name-1.5_x/snapshots/0123", "org/name-1.5_x"),
        ("a/b/c", "/data/model", None),
    ],
)
def test_base_model(origin: str, source: str, expected: str | None) -> None:
    assert card.hub_id(Job(Path(source), Path("out"), Recipe.of(RTN()), origin=origin)) == expected


def test_a_hub_id_is_the_base_model(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pipeline, "push", lambda *args: "")
    job = make_job(str(source), RTN(group_size=32), Options(out=tmp_path / "out", no_eval=True, device="cpu"))
    pipeline.compress_checkpoint(replace(job, origin="org/name", push_to="me/mine"))
    found = front(tmp_path / "out")
    assert (found["base_model"], found["base_model_relation"]) == ("org/name", "quantized")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# me/mine" in text
    assert "from_pretrained('me/mine')" in text


def test_the_config_does_not_say_what_the_base_is(source: Path, tmp_path: Path) -> None:
    """Whoever fine-tunes org/name and saves the result leaves its id there."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/name"}))
    run(source, tmp_path / "out")
    assert "base_model" not in front(tmp_path / "out")


SNIPPETS = {
    "compressed-tensors": ("pip install transformers compressed-tensors", "from_pretrained('x')"),
    "gptq": ("pip install transformers gptqmodel", "from_pretrained('x')"),
    "gptq_v2": ("pip install transformers gptqmodel", "from_pretrained('x')"),
    "bitsandbytes": ("pip install transformers bitsandbytes", "from_pretrained('x')"),
    "dense": ("pip install transformers\n", "from_pretrained('x')"),
    "native": ("pip install compress-llm", "import compress", "compress eval x"),
    "gguf": ("gguf_file='m.gguf'", "llama-cli -m m.gguf"),
}


@pytest.mark.parametrize("form", SNIPPETS)
def test_load_snippet(form: str) -> None:
    text = card.load_snippet(form, "x", "m.gguf" if form == "gguf" else None)
    for part in SNIPPETS[form]:
        assert part in text
    assert (form == "native") == ("import compress" in text)
    code = text.partition("```python\n")[2].partition("\n```")[0]
    compile(code, "snippet", "exec")


def test_every_format_has_a_snippet() -> None:
    assert set(FORMATS) <= set(SNIPPETS)


@pytest.mark.parametrize("form", ["native", "gptq", "gptq_v2", "dense"])
def test_tags_of_formats(source: Path, tmp_path: Path, form: str) -> None:
    run(source, tmp_path / "out", format=form)
    tags = front(tmp_path / "out")["tags"]
    assert ("gptq" in tags) == form.startswith("gptq")
    assert "gptq_v2" not in tags
    assert "native" not in tags
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize(
    ("label", "hub", "revision", "split", "config"),
    [
        ("wikitext2 (Salesforce/wikitext @ b08601e0, test)", "Salesforce/wikitext", "b08601e0", "test", None),
        ("org/set:conf @ 1588ec45, validation", "org/set", "1588ec45", "validation", "conf"),
        ("bundled (text/heldout.txt)", "text", None, None, None),
    ],
)
def test_data_sets_of_the_hub_are_named_by_their_id(
    label: str, hub: str, revision: str | None, split: str | None, config: str | None
) -> None:
    from types import SimpleNamespace

    from compress.calibration import EvalText
    from compress.evaluate.perplexity import Score

    text = EvalText(torch.zeros(4, dtype=torch.int64), label, "protocol", "none")
    score = Score(float("inf"), 2, 30, 16, 0.25, 0.5)
    result: Any = SimpleNamespace(score=score, job=SimpleNamespace(text=text))
    found = card._evaluations(result)
    assert [r.metric_type for r in found] == ["kl_divergence", "top1_agreement"]  # YAML could, JSON cannot hold inf
    first = found[0]
    assert first.dataset_type == hub
    assert (first.dataset_revision, first.dataset_split, first.dataset_config) == (revision, split, config)
