"""Several models against one original: each figure by a straightforward computation, and what it costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import compress
from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.evaluate import measure as measuring
from compress.evaluate.figures import all_figures
from compress.evaluate.layers import relative_error
from compress.evaluate.measure import Measured, Setting, measure
from compress.evaluate.scores import pieces
from compress.evaluate.states import Cache
from compress.evaluate.windows import Windows, make_windows
from compress.weights import Weights

CPU = torch.device("cpu")
SETTING = Setting(CPU, torch.float32)


@pytest.fixture(scope="module")
def packed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("packed")
    for bits in (2, 4):
        compress.run(toy, compress.RTN(bits=bits, group_size=32), folder / str(bits), no_eval=True)
    return [folder / "2", folder / "4"]


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (9 * 32 + 17,), generator=torch.Generator().manual_seed(3))


def weights(folder: Path) -> Weights:
    return Weights(Checkpoint.open(folder))


@pytest.fixture(scope="module")
def naive(toy: Path, packed: list[Path], tokens: torch.Tensor) -> dict[str, Any]:
    """float64 models with the weights that the files hold, all in memory."""
    from transformers import AutoModelForCausalLM

    found = {}
    for name, folder in (("base", toy), ("2", packed[0]), ("4", packed[1])):
        model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float64).eval()
        read = weights(folder)
        for key, parameter in model.named_parameters():
            if key in read.shapes_cache():
                parameter.data.copy_(read.read(key))
        found[name] = model
    return found


@torch.no_grad()
def log_probs(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(model(rows).logits.double(), -1)


def check(found: Measured, naive: dict[str, Any], windows: Windows, sizes: torch.Tensor) -> None:
    base, scores, _ = all_figures(found.base, found.models, windows, sizes)
    assert base is not None
    p = log_probs(naive["base"], windows.rows)
    targets = windows.rows.roll(-1, 1)[..., None]
    held = sum(
        int(sizes[int(windows.starts[r]) + t])
        for r in range(len(windows.rows))
        for t in range(int(windows.first[r]), int(windows.last[r]))
    )
    for score, name in zip((base, *scores), ("base", "2", "4"), strict=True):
        q = log_probs(naive[name], windows.rows)
        nll = -q.gather(2, targets)[..., 0][windows.predictions]
        assert score.perplexity == pytest.approx(math.exp(float(nll.mean())), rel=1e-6)
        assert score.bits_per_byte == pytest.approx(float(nll.sum()) / math.log(2) / held, rel=1e-6)
        assert score.perplexity_low is not None
        assert score.perplexity_high is not None
        assert score.perplexity_low < score.perplexity < score.perplexity_high
        if name == "base":
            assert score.kl is None
            continue
        kl = (p.exp() * (p - q)).sum(-1)[windows.positions]
        quantiles = torch.quantile(kl, torch.tensor([0.5, 0.99, 0.999, 1.0], dtype=torch.float64)).tolist()
        assert score.kl == pytest.approx(float(kl.mean()), rel=1e-5)
        assert [score.kl_median, score.kl_p99, score.kl_p999, score.kl_max] == pytest.approx(quantiles, rel=1e-4)
        best, other = p.argmax(-1), q.argmax(-1)
        assert score.top1 == pytest.approx(float((best == other)[windows.positions].double().mean()), abs=0.004)
        right = [(x == targets[..., 0])[windows.predictions] for x in (best, other)]
        assert score.lost == pytest.approx(float((right[0] & ~right[1]).double().mean()), abs=0.004)
        assert score.gained == pytest.approx(float((right[1] & ~right[0]).double().mean()), abs=0.004)
        assert score.nll_more == pytest.approx(math.log(score.perplexity / base.perplexity), rel=1e-6)


@pytest.mark.parametrize("stride", [None, 12])
def test_figures(
    toy: Path, packed: list[Path], tokens: torch.Tensor, naive: dict[str, Any], stride: int | None
) -> None:
    windows = make_windows(tokens, 32, stride)
    found = measure([weights(p) for p in packed], weights(toy), windows, SETTING)
    assert found.forwards == 3, "one walk through the base, whatever the number of models"
    check(found, naive, windows, torch.randint(0, 7, (len(tokens),), generator=torch.Generator().manual_seed(1)))


def test_batch_and_chunk_change_nothing(
    toy: Path, packed: list[Path], tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = make_windows(tokens, 32)
    found = []
    for size, chunk in ((8, 1 << 24), (1, 320 * 4 * 5), (4, 1), (2, 320 * 4 * 70)):
        monkeypatch.setattr(measuring, "fitting", lambda *given, size=size: size)
        monkeypatch.setattr("compress.evaluate.scores.CHUNK_BYTES", {"cpu": chunk})
        _, (score,), _ = all_figures(
            *values(measure([weights(packed[0])], weights(toy), windows, SETTING)), windows, None
        )
        found.append((score.perplexity, score.kl, score.kl_p99))
    for other in found[1:]:
        assert other[:2] == pytest.approx(found[0][:2], rel=1e-6)
        assert other[2] == pytest.approx(found[0][2], rel=1e-5), "of a single position, in float32"


def values(found: Measured) -> tuple[Any, Any]:
    return found.base, found.models


def test_a_model_and_itself(toy: Path, tokens: torch.Tensor) -> None:
    """No distance at all, to the last bit, and intervals without width."""
    windows = make_windows(tokens, 32)
    base, (score,), _ = all_figures(*values(measure([weights(toy)], weights(toy), windows, SETTING)), windows, None)
    assert base is not None
    assert [score.kl, score.kl_low, score.kl_high, score.kl_max, score.nll_more, score.lost] == [0.0] * 6
    assert [score.top1, score.top1_low, score.top1_high] == [1.0] * 3
    assert score.perplexity == base.perplexity
    assert score.bits_per_byte is None
    assert score.as_json()["flips"]["share"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_pieces_cover_what_counts_once() -> None:
    windows = make_windows(torch.arange(100), 16, 5)
    for positions in (1, 7, 16, 40, 1000):
        seen = torch.zeros(len(windows.rows), 16, dtype=torch.int64)
        for begin in range(0, len(seen), 4):
            count = min(4, len(seen) - begin)
            for rows, columns in pieces(windows, begin, count, positions):
                assert (rows.stop - rows.start) * (columns.stop - columns.start) <= positions
                seen[begin + rows.start : begin + rows.stop, columns] += 1
        assert torch.equal(seen, windows.predictions.long())


def test_models_in_groups(toy: Path, packed: list[Path], tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where heads do not fit beside each other nothing changes but the notes."""
    windows, models = make_windows(tokens, 32), [weights(p) for p in packed]
    together = measure(models, weights(toy), windows, SETTING)
    monkeypatch.setattr(measuring, "free_memory", lambda device: 0)
    apart = measure(models, weights(toy), windows, SETTING)
    assert apart.forwards == 3
    assert "1 models at a time" in apart.notes[0]
    for one, other in zip(together.models, apart.models, strict=True):
        assert torch.equal(one.nll, other.nll)


def test_cache(toy: Path, packed: list[Path], tokens: torch.Tensor, tmp_path: Path) -> None:
    """A later run takes the base's states from the cache, to the same bits; the cache keeps to its limit."""
    windows, cache = make_windows(tokens, 32), Cache(tmp_path / "states", 10**8)
    first = measure([weights(packed[0])], weights(toy), windows, SETTING, cache=cache)
    again = measure([weights(packed[0])], weights(toy), windows, SETTING, cache=cache)
    assert (first.forwards, again.forwards) == (2, 1)
    assert "from the cache" in again.notes[0]
    for one, other in ((first.base, again.base), (first.models[0], again.models[0])):
        assert one is not None
        assert other is not None
        assert torch.equal(one.nll, other.nll)
    assert torch.equal(first.models[0].kl, again.models[0].kl)  # type: ignore[arg-type]
    other = make_windows(tokens, 16)
    assert measure([weights(packed[0])], weights(toy), other, SETTING, cache=cache).forwards == 2, "other windows"
    files = list(cache.folder.glob("*.safetensors"))
    assert len(files) == 2
    size = max(f.stat().st_size for f in files)
    tight = Cache(cache.folder, int(size * 1.5))
    measure([weights(packed[0])], weights(toy), make_windows(tokens, 24), SETTING, cache=tight)
    left = list(cache.folder.glob("*.safetensors"))
    assert len(left) == 1
    assert left[0] not in files, "what was used longest ago goes first"
    left[0].write_bytes(left[0].read_bytes()[:-100])
    assert measure([weights(toy)], weights(toy), make_windows(tokens, 24), SETTING, cache=tight).forwards == 2
    refused = measure([weights(toy)], weights(toy), windows, SETTING, cache=Cache(tmp_path / "none", 10))
    assert "--cache allows" in refused.notes[0]
    assert not (tmp_path / "none").exists()


def test_distances(toy: Path, packed: list[Path], tokens: torch.Tensor, naive: dict[str, Any]) -> None:
    """Errors of layers on the original's inputs, and of hidden states, by hooks on whole models."""
    windows = make_windows(tokens, 32)
    found = measure([weights(p) for p in packed], weights(toy), windows, SETTING, layers=True)
    assert len(found.distances) == 2
    names = [name for name, m in naive["base"].named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name]
    inputs, hidden = {}, {}
    for name in names:
        module = naive["base"].get_submodule(name)
        module.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0].flatten(0, 1)}))
    with torch.no_grad():
        for key, model in naive.items():
            for i, block in enumerate(model.model.layers):
                block.register_forward_hook(lambda m, a, out, at=(key, i): hidden.update({at: out}))
            model(windows.rows)
    for key, distances in zip(("2", "4"), found.distances, strict=True):
        assert [layer.name for layer in distances.layers] == names
        for layer in distances.layers:
            assert layer.kind == "uniform"
            w, other = (naive[k].get_parameter(f"{layer.name}.weight").detach() for k in ("base", key))
            x = inputs[layer.name]
            expected = float((x @ (w - other).t()).norm() / (x @ w.t()).norm())
            assert layer.error == pytest.approx(expected, rel=1e-4)
        for i, error in enumerate(distances.blocks):
            expected = float((hidden["base", i] - hidden[key, i]).norm() / hidden["base", i].norm())
            assert error == pytest.approx(expected, rel=1e-4)
    plain = measure([weights(packed[0])], weights(toy), windows, SETTING)
    assert torch.equal(plain.models[0].nll, found.models[0].nll)


def test_relative_error_of_nothing() -> None:
    assert torch.isnan(relative_error(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(3, 3)))


def test_layers_of_another_shape(toy: Path, make_model, tmp_path: Path, tokens: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=320,
        max_position_embeddings=128,
    )  # fmt: skip
    other = weights(make_model(config, tmp_path / "other"))
    windows = make_windows(tokens, 32)
    with pytest.raises(compress.CompressError, match="--layers"):
        measure([other], weights(toy), windows, SETTING, layers=True)
    assert measure([other], weights(toy), windows, SETTING).models[0].kl is not None, (
        "logits can be compared all the same"
    )


def test_what_stands_outside_the_blocks(toy: Path) -> None:
    model = BlockModel(weights(toy), torch.float32, CPU)
    assert measuring._outside(model) == 4 * (320 * 64 + 64)
