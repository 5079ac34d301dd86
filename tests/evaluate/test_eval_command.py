"""`compress eval`: what it refuses before it computes, what it tells, and lm-eval's tasks."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import api, cli
from compress.evaluate import suite, tasks


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> str:
    short = tmp_path_factory.mktemp("short") / "short.txt"
    short.write_text(text_file.read_text()[:6000])
    return str(short)


@pytest.fixture(scope="module")
def packed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("packed") / "out"
    compress.run(toy, compress.RTN(bits=3, group_size=32), out, no_eval=True)
    return str(out)


def test_report(
    toy: Path,
    packed: str,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole command: JSON on stdout alone, both files, every key of the schema."""
    args = [packed, str(toy), "--against", str(toy), "--text", text, "--window", "32", "--windows", "20"]
    args += ["--layers", "--device", "cpu", "--json", "-o", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", ["compress", "eval", *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert "written:" in told.err
    assert json.loads((tmp_path / "r.json").read_text()) == report
    assert set(report) == {
        "schema", "kind", "base", "models", "command", "versions", "machine", "date", "seconds", "notes",
    }  # fmt: skip
    assert (report["schema"], report["kind"], report["base"]["name"]) == (1, "evaluation", str(toy))
    first, itself = report["models"]
    assert first["average_bits"] == pytest.approx(3.5, abs=0.1)
    assert itself["average_bits"] is None
    found = first["texts"][0]
    assert (found["window"], found["windows"], found["predictions"], found["stride"]) == (32, 20, 20 * 31, None)
    for name in ("perplexity", "bits_per_byte", "top1"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert found["kl"]["median"] < found["kl"]["p99"] <= found["kl"]["p999"] <= found["kl"]["max"]
    assert found["flips"]["share"]["value"] == pytest.approx(1 - found["top1"]["value"])
    assert itself["texts"][0]["kl"]["mean"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert len(first["layers"]) == 28
    assert {"name", "block", "kind", "error"} == set(first["layers"][0])
    assert len(first["blocks"]) == 4
    assert all(layer["error"] == 0 for layer in itself["layers"])
    page = (tmp_path / "r.md").read_text()
    for part in ("perplexity", "bits a byte", "99.9", "relative output error", "(original)", "20 windows of 32 tokens"):
        assert part in page


def test_stride_lowers_perplexity_of_the_bundled_model(tmp_path: Path) -> None:
    """More context before each token: the bundled model predicts it better. Both cover the same tokens."""
    lines = (Path(api.folder("calib")) / "text" / "heldout.txt").read_text()[:4000]
    (tmp_path / "t.txt").write_text(lines)
    told = [
        api.evaluate_models(["bundled"], [str(tmp_path / "t.txt")], window=64, stride=stride, device="cpu")
        for stride in (64, 16)
    ]
    touching, strided = (report["models"][0]["texts"][0] for report in told)
    assert strided["perplexity"]["value"] < touching["perplexity"]["value"]
    assert strided["stride"] == 16
    bits = strided["bits_per_byte"]["value"] * math.log(2)
    assert 0 < bits < math.log(strided["perplexity"]["value"]), "a token has several bytes"


def test_models_of_other_tokenizers(toy: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Side by side without an original, each in its own tokens; refused against one."""
    report = api.evaluate_models(["bundled", toy], [text], window=64, windows=4, device="cpu")
    predictions = [model["texts"][0]["bits_per_byte"]["value"] for model in report["models"]]
    assert len(set(predictions)) == 2
    assert report["base"] is None
    with pytest.raises(compress.CompressError, match=r"vocabulary has 4096 entries, that of .* 320"):
        api.evaluate_models(["bundled"], [text], against=toy, device="cpu")


def test_another_tokenizer_of_the_same_size(toy: Path, text: str, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(toy, other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[200:202]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(compress.CompressError, match=r"its tokenizer is not that of .*: 2 of its"):
        api.evaluate_models([other], [text], against=toy, device="cpu")
    with pytest.raises(compress.CompressError, match="its tokenizer is not that of"):
        compress.score(other, text, against=toy, device="cpu")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stride": 33}, "--stride: a stride of 33 does not fit windows of 32 tokens"),
        ({"stride": 0}, "--stride"),
        ({"windows": 0}, "--windows: 0 windows"),
        ({"window": 129}, "--window: 129 tokens a window are out of range; use 2 to 128"),
        ({"layers": True}, "--layers: no original.*--against"),
        ({"cache_gb": -1}, "--cache"),
        ({"texts": ["c4-old"], "stride": 8}, "--stride"),
    ],
)
def test_refused_before_anything_runs(
    toy: Path, text: str, given: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **more: Any) -> None:
        raise AssertionError("it ran")

    crops = suite.Text(torch.zeros(256 * 32, dtype=torch.int64), "c4-old", "", "", crops=256)
    if "texts" in given:
        monkeypatch.setattr(suite, "read_text", lambda *given: crops)
    monkeypatch.setattr(suite, "measure", fail)
    with pytest.raises(compress.CompressError, match=says):
        api.evaluate_models([toy], **{"texts": [text], "window": 32, "device": "cpu"} | given)


def test_too_short(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the river runs")
    with pytest.raises(compress.CompressError, match=r"--text: the text has \d+ tokens, one window needs 128"):
        api.evaluate_models([toy], [str(tmp_path / "t.txt")], device="cpu")


def test_cache_is_an_option(toy: Path, packed: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    told = [api.evaluate_models([packed], [text], against=toy, windows=2, device="cpu", cache_gb=0.1) for _ in range(2)]
    assert told[0]["models"][0]["texts"] == told[1]["models"][0]["texts"]
    assert any("from the cache" in note for note in told[1]["notes"])
    assert not any("from the cache" in note for note in told[0]["notes"])


# --- tasks


def test_without_lm_eval(toy: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(compress.CompressError, match=r"--tasks: tasks need .*compress-llm\[eval\]"):
        api.evaluate_models([toy], [text], tasks=["hellaswag"], device="cpu")


def test_results_of_lm_eval() -> None:
    """Its keys, "metric,filter" and "metric_stderr,filter", as values with errors."""
    given = {
        "results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,x": 0.25, "em_stderr,x": "N/A"}},
        "versions": {"t": 1.0}, "n-shot": {"t": 0}, "n-samples": {"t": {"effective": 20}},
        "higher_is_better": {"t": {"acc": True}},
    }  # fmt: skip
    assert tasks._result("t", given) == {
        "version": 1.0,
        "shots": 0,
        "samples": 20,
        "metrics": {
            "acc": {"value": 0.5, "stderr": 0.1, "higher_is_better": True},
            "em,x": {"value": 0.25, "stderr": None, "higher_is_better": None},
        },
    }


TASK = """task: toy_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.filterwarnings("ignore")
def test_a_task_through_lm_eval(toy: Path, packed: str, tmp_path: Path) -> None:
    """Its accuracy is that of log-likelihoods by hand, packed and dense; an unknown task is refused first."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from compress.loading import load

    rows = [
        {
            "question": "the river runs",
            "choices": [" under an old stone", " zebra"][:: 1 - 2 * (i % 2)],
            "answer": i % 2,
        }
        for i in range(6)
    ] + [{"question": "a red fox", "choices": [" waits", " green leaf small"], "answer": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    with pytest.raises(compress.CompressError, match="knows no task 'nope'"):
        tasks.find(["nope"])
    known = tasks.find([str(tmp_path / "toy.yaml")])
    tokenizer = api.load_tokenizer(toy)
    for folder in (toy, Path(packed)):
        found = tasks.run(known, folder, tokenizer, torch.device("cpu"), torch.float32)
        model = load(folder, device="cpu", dtype="float32")
        right = 0
        for row in rows:
            begin = tokenizer(row["question"])["input_ids"]
            scores = []
            for choice in row["choices"]:
                ids = tokenizer(row["question"] + choice)["input_ids"]
                log = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                scores.append(sum(float(log[i - 1, ids[i]]) for i in range(len(begin), len(ids))))
            right += scores.index(max(scores)) == row["answer"]
        result = found["results"]["toy_choice"]
        assert result["metrics"]["acc"]["value"] == pytest.approx(right / len(rows))
        assert result["samples"] == len(rows)
