"""The bundled model behaves like a language model under compression, and it stays small."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import compress
from compress.api import load_tokenizer
from compress.assets import folder

pytestmark = pytest.mark.xdist_group("bundled")


@pytest.fixture(scope="module")
def tiny() -> Path:
    return folder("calib") / "tiny"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of the held-out text: enough for three digits, quick on two cores."""
    held_out = (folder("calib") / "text" / "heldout.txt").read_text()
    path = tmp_path_factory.mktemp("heldout") / "heldout.txt"
    path.write_text(held_out[: len(held_out) // 4])
    return path


@pytest.fixture(scope="module")
def dense(text: Path) -> float:
    """The perplexity that compression is measured against."""
    score, _, _ = compress.score("bundled", str(text))
    return score.perplexity


def perplexity(method: object, text: Path, out: Path) -> float:
    compress.run("bundled", method, out, calib="bundled", no_eval=True, samples=64, seq_len=256)  # type: ignore[arg-type]
    score, _, _ = compress.score(out, str(text))
    return score.perplexity


def test_size(tiny: Path) -> None:
    files = [*tiny.iterdir(), *(folder("calib") / "text").iterdir()]
    assert sum(f.stat().st_size for f in files) <= 10_000_000
    from compress.checkpoint import Checkpoint

    assert 3_000_000 <= sum(t.numel for t in Checkpoint.open(tiny).tensors.values()) <= 6_000_000


def test_model_card(tiny: Path) -> None:
    card = (tiny / "README.md").read_text()
    assert card.startswith("---")
    for word in ("license: apache-2.0", "SmolLM2-135M-Instruct", "reports/bundled-model/train.py"):
        assert word in card


def test_perplexity_under_a_tenth_of_unigram(tiny: Path, text: Path, dense: float) -> None:
    tokenizer = load_tokenizer(tiny)
    seen = torch.tensor(tokenizer((folder("calib") / "text" / "calibration.txt").read_text())["input_ids"])
    held_out = torch.tensor(tokenizer(text.read_text())["input_ids"])
    counts = torch.bincount(seen, minlength=4096).double() + 1
    unigram = math.exp(-float((counts / counts.sum()).log()[held_out].mean()))
    assert dense < unigram / 10


def test_three_bits_hurt_and_gptq_heals(text: Path, dense: float, tmp_path: Path) -> None:
    """3-bit round-to-nearest costs at least 5%; GPTQ wins back at least half of that."""
    rtn = perplexity(compress.RTN(bits=3, group_size=64), text, tmp_path / "rtn")
    gptq = perplexity(compress.GPTQ(bits=3, group_size=64), text, tmp_path / "gptq")
    assert rtn > 1.05 * dense
    assert gptq - dense < 0.5 * (rtn - dense)
