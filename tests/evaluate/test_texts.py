"""Protocols by their names, and how many bytes each token stands for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import calibration
from compress.evaluate.texts import read_text, sizes_of, token_bytes

MIXED = "plain words, caf\u00e9 \u2603 snow and \U0001f600 faces, \u6f22\u5b57 too. " * 40


def test_bytes_of_tokens(tokenizer: Any, tmp_path: Path) -> None:
    """They add up to the text, and those of any stretch to what the text has between its ends."""
    (tmp_path / "text.txt").write_text(MIXED, encoding="utf-8")
    text = read_text(str(tmp_path / "text.txt"), tokenizer, 64)
    assert text.sizes is not None
    assert len(text.sizes) == len(text.tokens)
    assert int(text.sizes.sum()) == len(MIXED.encode())
    assert sizes_of(text) is text.sizes
    ends = [end for _, end in tokenizer(MIXED, return_offsets_mapping=True)["offset_mapping"]]
    for cut in (1, 17, 100, len(ends) - 1):
        assert int(text.sizes[: cut + 1].sum()) == len(MIXED[: ends[cut]].encode())


def test_special_tokens_have_no_bytes() -> None:
    assert token_bytes("ab c", [(0, 0), (0, 2), (2, 4), (0, 0)]).tolist() == [0, 2, 2, 0]
    assert token_bytes("", []).tolist() == []


def test_a_tokenizer_without_offsets(tokenizer: Any, text_file: Path) -> None:
    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: str, **options: Any) -> Any:
            return tokenizer(text, **options)

    text = read_text(str(text_file), Slow(), 64)
    assert text.sizes is None
    assert any("no bits per byte" in note for note in text.notes)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """load_dataset records what it is asked for and returns `rows`."""
    datasets = pytest.importorskip("datasets")

    class Hub:
        rows: dict[str, list[str]] = {}  # noqa: RUF012
        asked: list[Any] = []  # noqa: RUF012

        def load_dataset(self, path: str, **options: Any) -> Any:
            self.asked.append((path, options["split"], options["data_files"]))
            return datasets.Dataset.from_dict(self.rows)

    made = Hub()
    made.asked = []
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    return made


def test_ptb_both_ways(hub: Any, tokenizer: Any) -> None:
    hub.rows = {"sentence": [f"sentence {i} of the bank" for i in range(50)]}
    for name, split, joiner in (
        ("ptb-new", "test", " "),
        ("ptb", "test", " "),
        ("ptb-old", "validation", "\n\n"),
    ):
        text = read_text(name, tokenizer, 64)
        assert text.tokens.tolist() == tokenizer(joiner.join(hub.rows["sentence"]))["input_ids"]
        assert hub.asked[-1][1:] == (split, {split: f"penn_treebank/{split}/0000.parquet"})
        assert text.protocol.startswith("ptb-new" if name == "ptb" else name)


def test_c4_both_ways(hub: Any, tokenizer: Any) -> None:
    documents = [" ".join(f"word{(i * 7 + j) % 83}" for j in range(5 + 37 * (i % 5))) for i in range(60)]
    hub.rows = {"text": documents}
    for name in ("c4-new", "c4"):
        assert read_text(name, tokenizer, 64).tokens.tolist() == tokenizer(" ".join(documents))["input_ids"]
    text = read_text("c4-old", tokenizer, 64)
    assert hub.asked[-1][2] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    # the loop of the reference's get_c4
    drawing, expected = random.Random(0), []
    for _ in range(256):
        while True:
            ids = tokenizer(documents[drawing.randint(0, 59)])["input_ids"]
            if len(ids) > 64:
                break
        begin = drawing.randint(0, len(ids) - 65)
        expected.append(torch.tensor(ids[begin : begin + 64]))
    assert torch.equal(text.tokens, torch.cat(expected))
    assert text.crops == 256
    assert text.sizes is not None
    assert len(text.sizes) == 256 * 64
    assert "64 tokens each" in text.protocol
    with pytest.raises(compress.CompressError, match="c4-old: none of 60 documents"):
        read_text("c4-old", tokenizer, 100_000)


def test_calibration_on_every_protocol() -> None:
    """Their upper halves are calibration recipes of the same data sets."""
    for new, old in (("ptb-new", "ptb"), ("c4-new", "c4"), ("c4-old", "c4")):
        files = [Path(calibration.__file__).parent.parent / "calib" / f"{name}.toml" for name in (new, old)]
        keys = [file.read_text().partition("[eval]")[0].splitlines() for file in files]
        kept = [[line.split("  #")[0] for line in part if line and not line.startswith("#")] for part in keys]
        assert kept[0] == kept[1]
