"""The report without a browser: what is gathered, that its three files say the same, that no text breaks out."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="matplotlib draws the report: pip install 'compress-llm[report]'")

import compress
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.passes.int8 import Int8
from compress.passes.rtn import RTN
from compress.passes.smoothquant import SmoothQuant
from compress.passes.spqr import SpQR
from compress.report import html
from compress.report.html import svg, words
from compress.report.html.evaluations import estimate
from compress.report.html.gather import place
from compress.report.html.heat import grid
from compress.report.html.pareto import points
from compress.weights import Weights

pytestmark = pytest.mark.xdist_group("html")  # else each worker would make the runs

VOID = {"meta", "link", "br", "img", "input", "hr"}
NASTY = "<script>alert(1)</script>|`*evil*`\"'&amp;"
SECTIONS = "models pareto quality layers weights outliers costs warnings commands".split()


class Page(HTMLParser):
    """A page taken apart; what is not closed, or closed twice, fails."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.handlers: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("href", "src", "xlink:href", "action", "srcset", "poster"):
                self.links.append(value or "")
            if key.startswith("on"):
                self.handlers.append(key)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def runs(toy: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished folders. Read only."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text(text_file.read_text()[:3000])
    given: dict[str, Any] = {"device": "cpu", "calib": str(text), "samples": 2, "seq_len": 32}
    compress.run(toy, RTN(bits=4, group_size=32), folder / "rtn4", eval=str(text), **given)
    compress.run(toy, RTN(bits=2, group_size=32), folder / "rtn2", eval=str(text), **given)
    compress.run(toy, SpQR(), folder / "spqr", no_eval=True, no_verify=True, **given)
    compress.run(toy, Int8(threshold=1.0), folder / "int8", no_eval=True, **given)
    compress.run(toy, SmoothQuant(), folder / "smooth", no_eval=True, **given)
    return {p.name: p for p in folder.iterdir() if p.is_dir()}


@pytest.fixture(scope="module")
def written(runs: dict[str, Path], toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, str]:
    """The three files of a report of all runs."""
    out = tmp_path_factory.mktemp("out") / "page.html"
    files = html.write(list(runs.values()), out, against=[toy], command="compress report everything")
    assert [f.name for f in files] == ["page.html", "page.json", "page.md"]
    text, values, markdown = (f.read_text() for f in files)
    return text, json.loads(values), markdown


def evaluation(folder: Path, name: str = "wikitext2", **more: Any) -> dict[str, Any]:
    """What `compress eval` writes of one model."""

    def about(value: float) -> dict[str, float]:
        return {"value": value, "low": 0.9 * value, "high": 1.1 * value}

    text = {
        "text": name, "protocol": "side by side", "window": 64, "stride": 32, "windows": 9, "predictions": 567,
        "perplexity": about(12.34), "kl": {"mean": about(0.0567), "p999": 1.25, "max": None}, "top1": about(0.875),
        "flips": {"share": about(0.125), "lost": 0.05},
    }  # fmt: skip
    model = {"name": folder.name, "folder": str(folder), "texts": [text], "tasks": {"quiz": about(0.5)}} | more
    base = {"name": "toy", "texts": [{"text": name, "perplexity": about(11.0)}]}
    return {"schema": 1, "kind": "evaluation", "base": base, "models": [model], "command": "compress eval it",
            "versions": {"compress": "0.1.0"}, "machine": {"device": "cpu"}, "seconds": {"heads": 7.0},
            "notes": ["few windows"]}  # fmt: skip


def test_the_page_is_whole_and_alone(written: tuple[str, Any, str]) -> None:
    page = Page(written[0])
    assert set(SECTIONS) <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    for link in page.links:
        assert link.startswith(("#", "data:")), link
        assert not link.startswith("#") or link[1:] in page.ids, link
    assert page.handlers == []
    assert "://" not in written[0].split("<body>")[0]
    assert "default-src 'none'" in written[0]
    assert re.findall(r"url\((?!#)", written[0]) == []
    assert set(re.findall(r"url\(#([^)]+)\)", written[0])) <= set(page.ids)
    assert not {"iframe", "object", "embed", "form"} & set(page.tags)
    assert len(written[0]) < 1_000_000


def test_every_colour_of_a_figure_is_a_variable(written: tuple[str, Any, str]) -> None:
    for drawn in re.findall(r"<svg.*?</svg>", written[0], re.S):
        assert re.findall(r"#[0-9a-f]{6}\b", re.sub(r'(xlink:)?href="[^"]*"|<title>.*?</title>', "", drawn)) == []
        assert 'role="img"' in drawn
        assert "aria-label=" in drawn
    assert set(re.findall(r"var\(--([\w-]+)\)", written[0])) <= set(svg.COLOURS)


def test_the_numbers_are_the_records_own(written: tuple[str, Any, str], runs: dict[str, Path]) -> None:
    _, values, markdown = written
    page = Page(written[0]).words
    assert (values["schema"], values["kind"]) == (html.SCHEMA, html.KIND)
    for model in values["models"]:
        record = json.loads((runs[model["name"]] / "report.json").read_text())
        size = record["size"]
        assert model["bytes"] == size["bytes_after"]
        assert model["bits_per_weight"] == pytest.approx(size["bits_per_weight"])
        assert [x["error"] for x in model["layers"]] == [x["relative_error"] for x in record["layers"]]
        assert model["seconds"] == pytest.approx(record["seconds"])
        if record["evaluation"] is not None:
            found = model["scores"][0]
            assert found["perplexity"]["value"] == record["evaluation"]["compressed"]["perplexity"]
            assert found["kl"]["value"] == record["evaluation"]["compressed"]["kl"]
        assert model["headline"] in page
        assert model["headline"] in markdown
        for note in (note for x in record["layers"] for note in x["notes"]):
            assert any(note in text for w in model["warnings"] for text in (w["text"], *w["layers"])), note


def test_page_and_markdown_hold_the_same_cells(written: tuple[str, Any, str]) -> None:
    page = Page(written[0]).words
    cells = [c.strip() for line in written[2].splitlines() if line.startswith("| ") for c in line[1:-1].split(" | ")]
    assert len(cells) > 300
    for cell in cells:
        for part in re.split(r" \((?=[^)]*\)$)", cell):
            plain = re.sub(r"\\(.)", r"\1", part).removesuffix(")").replace("&lt;", "<").replace("&amp;", "&")
            assert " ".join(plain.split()) in page, cell


def test_the_keys_are_those_that_are_documented(written: tuple[str, Any, str]) -> None:
    told = set(re.findall(r"\w+", str(html.__doc__)))
    free = {"seconds", "beside", "room", "versions", "tasks"}

    def look(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                assert key in told, key
                if key not in free:
                    look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    look(written[1])


def test_histograms_and_outliers_are_read_from_the_files(
    written: tuple[str, Any, str], runs: dict[str, Path], toy: Path
) -> None:
    original = Weights(Checkpoint.open(toy))
    models = {m["name"]: m for m in written[1]["models"]}
    for name, model in models.items():
        after = Weights(Checkpoint.open(runs[name]))
        worst = sorted(model["layers"], key=lambda x: -x["error"])[:3]
        assert [h["layer"] for h in model["histograms"]] == [x["name"] for x in worst]
        for found in model["histograms"]:
            assert sum(found["before"]) + found["outside"][0] == pytest.approx(1, abs=2e-3)
            assert sum(found["after"]) + found["outside"][1] == pytest.approx(1, abs=2e-3)
            a, b = (w.read(found["layer"] + ".weight").float() for w in (original, after))
            assert found["distance"] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-4)
            assert found["zeros"][1] == pytest.approx(float((b == 0).float().mean()), abs=1e-5)
    assert models["rtn4"]["outliers"] is None
    assert models["smooth"]["rescaled"]
    assert not models["rtn4"]["rescaled"]
    for name, unit in (("spqr", "weights"), ("int8", "columns")):
        found = models[name]["outliers"]
        assert found["unit"] == unit
        kept = sum(x["outliers"] * (1 if unit == "weights" else x["shape"][0]) for x in models[name]["layers"])
        per_kind = {x["kind"]: x["shape"][0] * x["shape"][1] for x in models[name]["layers"]}
        shown = sum(s["total"] * per_kind[s["kind"]] * len(s["blocks"]) for s in found["strips"])
        assert shown == pytest.approx(kept, rel=1e-4)
    assert models["spqr"]["outliers"]["mask"]["total"] > 0


def test_one_run_has_no_front_and_says_so(runs: dict[str, Path], toy: Path) -> None:
    facts = html.gather([runs["spqr"]], against=[toy])
    page = Page(html.page(facts)).words
    for told in ("makes no front", "Calibration: ", "not read back", "--no-eval"):
        assert told in page
    assert "not measured" in page
    assert "makes no front" in html.markdown(facts)


def test_without_the_original_the_section_says_so(runs: dict[str, Path], tmp_path: Path) -> None:
    facts = html.gather([runs["rtn4"]])
    assert facts.models[0].histograms == ()
    assert "is not on this machine any more" in facts.models[0].unseen
    assert "--against FOLDER names it" in Page(html.page(facts)).words
    assert "--against FOLDER names it" in html.markdown(facts)


def test_another_model_is_not_taken_for_the_original(runs: dict[str, Path], toy: Path, tmp_path: Path) -> None:
    from compress.checkpoint import read_tensor
    from compress.writer import save_tensors

    wrong = Path(shutil.copytree(toy, tmp_path / "wrong"))
    stored = Checkpoint.open(wrong).tensors
    tensors = {name: read_tensor(s, name) for name, s in stored.items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_tensors(wrong / "model.safetensors", tensors)
    found = html.gather([runs["rtn4"]], against=[wrong]).models[0]
    assert found.histograms == ()
    assert "wrong is not the original: its model.norm.weight has other values" in found.unseen


def test_an_evaluation_brings_intervals(runs: dict[str, Path], toy: Path, tmp_path: Path) -> None:
    layers = [
        {"name": x["name"], "error": 0.25} for x in json.loads((runs["spqr"] / "report.json").read_text())["layers"]
    ]
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(evaluation(runs["spqr"], layers=layers)))
    html.write([runs["spqr"], runs["rtn4"], file], tmp_path / "r.html", against=[toy])
    model = json.loads((tmp_path / "r.json").read_text())["models"][0]
    score = model["scores"][0]
    assert score["perplexity"] == {"value": 12.34, "low": 0.9 * 12.34, "high": 1.1 * 12.34}
    assert score["original"]["value"] == 11.0
    assert score["kl_tail"] == {"p999": 1.25}
    assert score["flips"] == {"share": 0.125, "lost": 0.05}
    assert {x["measure"] for x in model["layers"]} == {"evaluation"}
    page = Page((tmp_path / "r.html").read_text()).words
    for text in (page, (tmp_path / "r.md").read_text()):
        for told in (
            "12.34",
            "11.11 to 13.57",
            "0.0567",
            "87.50%",
            "few windows",
            "heads 7.0 s",
            "quiz",
            "compress eval it",
        ):
            assert told in text
    assert "different texts" in page  # the other model brings its own


@pytest.mark.parametrize("drop", ["base", "command", "versions", "machine", "notes"])
def test_an_evaluation_may_lack_keys(runs: dict[str, Path], tmp_path: Path, drop: str) -> None:
    values = evaluation(runs["spqr"])
    del values[drop]
    values["models"][0]["texts"] = [{"text": "t", "perplexity": 9.0}]
    (tmp_path / "eval.json").write_text(json.dumps(values))
    facts = html.gather([runs["spqr"]], [tmp_path / "eval.json"])
    assert facts.models[0].scores[0].perplexity == estimate(9.0)
    assert facts.models[0].scores[0].kl is None


def test_no_text_breaks_out(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["rtn4"], tmp_path / "<b>x</b>&'\""))
    for name in ("report.json", "compress.json"):
        record = json.loads((folder / name).read_text())
        record["source"]["name"] = NASTY
        record["layers"][0]["notes"] = [NASTY]
        record["calibration"] = {"source": NASTY, "notes": [NASTY]}
        record["evaluation"]["text"] = NASTY
        record["versions"][NASTY] = NASTY
        record["seconds"] = {NASTY: 1.0}
        (folder / name).write_text(json.dumps(record))
    facts = html.gather([folder, runs["rtn2"]])
    page = Page(html.page(facts))
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert NASTY in " ".join(page.text)
    text = html.markdown(facts)
    outside = re.sub(r"^```$.*?^```$", "", text, flags=re.S | re.M)
    assert "<script" not in outside
    assert all(line.count("|") - line.count("\\|") >= 2 for line in outside.splitlines() if line.startswith("|"))
    json.dumps(html.as_json(facts), allow_nan=False)


def test_what_is_no_finished_run_is_refused(runs: dict[str, Path], toy: Path, tmp_path: Path) -> None:
    def line(*folders: Path) -> str:
        with pytest.raises(CompressError) as caught:
            html.gather(folders)
        return caught.value.line()

    (tmp_path / "half.partial").mkdir()
    (tmp_path / "half.partial" / "fingerprint.json").write_text("{}")
    assert "not finished" in line(tmp_path / "half")
    assert "not finished" in line(tmp_path / "half.partial")
    assert "no such folder" in line(tmp_path / "none")
    assert "compress did not write it" in line(toy)
    assert "given twice" in line(runs["rtn4"], runs["rtn4"].parent / "." / "rtn4")
    assert "pass folders" in line()
    broken = Path(shutil.copytree(runs["rtn4"], tmp_path / "broken"))
    (broken / "report.json").write_text("{")
    assert "not readable JSON" in line(broken)
    (broken / "report.json").write_text('{"layers": [1], "method": {}, "source": {}, "size": {}}')
    assert "not the record of a run" in line(broken)
    (tmp_path / "other.json").write_text('{"kind": "bench"}')
    with pytest.raises(CompressError, match="is not an evaluation"):
        html.gather([runs["rtn4"]], [tmp_path / "other.json"])
    (tmp_path / "other.json").write_text('{"kind": "evaluation", "models": [], "schema": 7}')
    with pytest.raises(CompressError, match="schema 7"):
        html.gather([runs["rtn4"]], [tmp_path / "other.json"])


def test_without_report_json_the_rest_is_shown(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["rtn4"], tmp_path / "rtn4"))
    (folder / "report.json").unlink()
    page = Page(html.page(html.gather([folder]))).words
    assert "seconds and memory are not known" in page


def test_only_reports_are_written_over(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["rtn4"], tmp_path / "rtn4"))
    before = (folder / "report.json").read_bytes()
    with pytest.raises(CompressError, match=r"report\.json: exists and is not a report"):
        html.write([folder], folder / "report.html")
    assert (folder / "report.json").read_bytes() == before
    assert not (folder / "report.html").exists()
    html.write([folder], tmp_path / "new" / "page.html")
    html.write([folder], tmp_path / "new" / "page.html")
    (tmp_path / "new" / "page.md").write_text("mine")
    with pytest.raises(CompressError, match=r"page\.md: exists"):
        html.write([folder], tmp_path / "new" / "page.html")
    with pytest.raises(CompressError, match="not the name of a page"):
        html.write([folder], tmp_path / "page")


def test_without_matplotlib_the_error_names_the_extra(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CompressError, match=r"compress-llm\[report\]"):
        html.write([runs["rtn4"]], tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_originals_may_differ_and_it_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["rtn4"], tmp_path / "rtn4"))
    for name in ("report.json", "compress.json"):
        record = json.loads((folder / name).read_text())
        record["source"]["name"] = "org/other"
        (folder / name).write_text(json.dumps(record))
    facts = html.gather([runs["rtn2"], runs["rtn4"], folder])
    assert len({m.name for m in facts.models}) == 3  # two folders are called rtn4
    page = Page(html.page(facts)).words
    assert "2 originals" in page
    assert "bits a parameter, all of the model" in page


def test_the_front_is_of_those_that_none_beats(runs: dict[str, Path]) -> None:
    found = points(html.gather([runs["rtn2"], runs["rtn4"]]), "kl")
    assert [p.name for p in found] == ["rtn2", "rtn4"]
    assert found[0].front
    assert found[1].front == (found[1].quality.value < found[0].quality.value)


def test_the_command_is_made_of_what_is_recorded(runs: dict[str, Path]) -> None:
    facts = html.gather([runs["rtn2"], runs["spqr"]])
    assert facts.models[0].rebuilt.startswith("compress rtn toy --bits 2 --group-size 32 --eval ")
    assert "--samples 2 --seq-len 32 --no-eval" in facts.models[1].rebuilt


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.12.self_attn.q_proj", (12, "self_attn.q_proj")),
        ("model.layers.3.mlp.experts.17.up_proj", (3, "mlp.experts.*.up_proj")),
        ("transformer.h.0.attn.c_attn", (0, "attn.c_attn")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_a_layer_has_a_block_and_a_kind(name: str, found: tuple[int | None, str]) -> None:
    assert place(name) == found


def test_the_map_begins_pale_and_ends_strong(runs: dict[str, Path]) -> None:
    found = grid(html.gather([runs["rtn4"]]).models[0])
    assert found.level(min(found.values)) == 0
    assert found.level(max(found.values)) == svg.LEVELS - 1
    assert len(found.blocks) == 4
    assert len(found.kinds) == 7


@pytest.mark.parametrize(
    ("say", "value", "text"),
    [
        (words.figures, 0.022559, "0.0226"), (words.figures, 1234.5, "1,234"), (words.figures, 3.6e-7, "3.60e-7"),
        (words.figures, 0, "0"), (words.figures, None, "-"), (words.percent, 0.5, "50.0%"),
        (words.size, 3724224, "3.72 MB"), (words.size, 12, "12 B"), (words.duration, 0.022, "0.02 s"),
        (words.duration, 7200, "2.0 h"), (words.duration, 120, "2.0 min"), (words.perplexity, 15622.1, "15,622"),
    ],
)  # fmt: skip
def test_words(say: Callable[[Any], str], value: Any, text: str) -> None:
    assert say(value) == text


def test_kinds_are_short_where_that_tells_them_apart() -> None:
    found = words.kinds(["self_attn.q_proj", "mlp.gate", "mlp.experts.*.gate"])
    assert found == {"self_attn.q_proj": "q_proj", "mlp.gate": "mlp.gate", "mlp.experts.*.gate": "*.gate"}


def test_the_command_line(
    runs: dict[str, Path],
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from compress.cli import main

    def give(*words: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["compress", "report", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code

    out = tmp_path / "r.html"
    assert give(str(runs["rtn4"]), "-o", str(out), "--against", str(toy), "--quiet") == 0
    assert "r.json" in capsys.readouterr().out
    assert f"compress report {runs['rtn4']} -o" in Page(out.read_text()).words
    assert give(str(runs["rtn4"]), "-o", str(out), "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == html.KIND
    assert give(str(tmp_path / "none")) == 2
    assert "no such folder" in capsys.readouterr().err
