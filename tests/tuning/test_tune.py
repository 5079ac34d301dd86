"""`compress tune`: the divergence on held-out rows falls or nothing changes; codes stay, files are whole."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import api, cli
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.examine import examine
from compress.passes.gptq import GPTQ
from compress.passes.nf4 import NF4
from compress.passes.rtn import RTN
from compress.tuning import tune as tuning
from compress.tuning.asked import Tuning
from compress.tuning.slopes import Slopes
from compress.tuning.whole import Student, load
from compress.verify import check_hashes
from compress.weights import Weights

pytestmark = pytest.mark.xdist_group("tune")  # else each worker would compress the same

RUN: dict[str, Any] = {"samples": 16, "seq_len": 48, "device": "cpu", "no_eval": True, "no_client": True}


@pytest.fixture(scope="module")
def packed(toy: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    compress.run(toy, GPTQ(2, 32), out, calib=str(text_file), **RUN)
    return out


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["compress", "tune", *words, "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


SMALL = ("--samples", "16", "--seq-len", "48", "--steps", "12", "--looks", "3")


def test_a_packed_checkpoint_comes_nearer(
    toy: Path, packed: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "tuned"
    words = (str(packed), "--against", str(toy), "--calib", str(text_file), "-o", str(out), *SMALL, "--rate", "0.01")
    assert command(monkeypatch, *words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["after"] < told["before"]
    assert told["layers"] == told["packed"] == told["proof"]["layers"] == 28
    assert "transformers" in told["proof"]["clients"][0]
    before, after = Weights(Checkpoint.open(packed)), Weights(Checkpoint.open(out))
    assert after.packed == before.packed
    assert after.format_name == before.format_name
    moved = 0
    for name in sorted(after.packed):
        old, new = before.read_packed(name).tensors(), after.read_packed(name).tensors()
        assert torch.equal(old["codes"], new["codes"])
        moved += int((old["scales"] != new["scales"]).sum())
    assert moved > 100
    gains = [n for n in after.checkpoint.tensors if "layernorm" in n]
    assert any(not torch.equal(before.checkpoint.read(n), after.checkpoint.read(n)) for n in gains)
    rest = [n for n in after.checkpoint.tensors if n in before.checkpoint.tensors and "layers" not in n]
    assert rest
    assert all(torch.equal(before.checkpoint.read(n), after.checkpoint.read(n)) for n in rest)
    check_hashes(out)
    record = json.loads((out / "compress.json").read_text())
    assert record["tuned"]["after"] == told["after"]
    assert record["tuned"]["settings"]["rate"] == 0.01
    assert "Tuned end to end" in (out / "README.md").read_text()
    again = tmp_path / "again"
    assert command(monkeypatch, *words[:5], "-o", str(again), *words[7:], "--quiet") == 0
    assert "every code stayed" in capsys.readouterr().out
    new = Weights(Checkpoint.open(again))
    assert all(torch.equal(after.checkpoint.read(n), new.checkpoint.read(n)) for n in after.checkpoint.tensors)


def test_what_held_out_rows_do_not_bear_out_is_not_kept(
    toy: Path, packed: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tuning._divergence
    asked: list[float] = []

    def rising(*given: Any) -> float:
        asked.append(real(*given) + len(asked))
        return asked[-1]

    monkeypatch.setattr(tuning, "_divergence", rising)
    options = compress.Options(calib=str(text_file), samples=8, seq_len=32, device="cpu")
    done = tuning.run(packed, toy, options, tmp_path / "out", Tuning(steps=2, looks=2), client=False)
    assert done.after == done.before
    assert any("stay as they were" in note for note in done.notes)
    before, after = Checkpoint.open(packed), Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(before.read(n), after.read(n)) for n in before.tensors)


@pytest.mark.parametrize("method", [NF4(), RTN(4, 32, symmetric=False)])
def test_other_formats(method: Any, toy: Path, text_file: Path, tmp_path: Path) -> None:
    compress.run(toy, method, tmp_path / "packed", calib=str(text_file), **RUN)
    options = compress.Options(calib=str(text_file), samples=8, seq_len=32, device="cpu")
    done = tuning.run(tmp_path / "packed", toy, options, tmp_path / "out", Tuning(steps=4, looks=2, gain_rate=0.0))
    assert done.after <= done.before
    assert done.proof is not None
    names = [n for n in Checkpoint.open(toy).tensors if "norm" in n]
    old, new = Checkpoint.open(toy), Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(old.read(n), new.read(n)) for n in names)


def test_what_is_refused(toy: Path, packed: Path, text_file: Path, tmp_path: Path, make_model: Any) -> None:
    options = compress.Options(calib=str(text_file), samples=8, seq_len=32, device="cpu")
    one = compress.Options(calib=str(text_file), samples=1, seq_len=32, device="cpu")
    for folder, original, given, says in (
        (toy, toy, options, "nothing in it is packed"),
        (packed, packed, options, "pass the model that it was made from"),
        (packed, toy, one, "nothing is left to learn from"),
    ):
        with pytest.raises(CompressError, match=says):
            tuning.run(folder, original, given, tmp_path / "out", Tuning(steps=1, looks=1))
        assert not (tmp_path / "out").exists()
    for settings, flag in (
        ({"steps": 0}, "steps"),
        ({"rate": 1.0}, "rate"),
        ({"rate": 0, "gain_rate": 0}, "gain-rate"),
    ):
        with pytest.raises(CompressError, match=flag):
            Tuning(**settings)


def quick(source: Path, original: Path, text_file: Path, out: Path, **given: Any) -> tuning.Tuned:
    """A few steps on a few rows."""
    options = compress.Options(calib=str(text_file), samples=8, seq_len=32, device="cpu")
    return tuning.run(source, original, options, out, Tuning(**{"steps": 4, "looks": 2, **given}), client=False)


def test_matrices_that_are_kept_transposed(tmp_path: Path, tokenizer: Any, make_model: Any, text_file: Path) -> None:
    """GPT-2's, which its checkpoint has as [in, out] and a packed one as [out, in]."""
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128)
    source = make_model(config, tmp_path / "gpt2", tokenizer)
    compress.run(source, RTN(3, 16), tmp_path / "packed", calib=str(text_file), format="native", **RUN)
    done = quick(tmp_path / "packed", source, text_file, tmp_path / "out")
    assert done.layers == 8
    assert done.after <= done.before
    assert done.proof is not None


def test_its_record_is_of_the_new_file(toy: Path, text_file: Path, tmp_path: Path) -> None:
    """Gains that were tuned are no damage to `compress verify`; what was measured before is not told of this file."""
    run = {**RUN, "no_eval": False}
    compress.run(toy, RTN(2, 32), tmp_path / "packed", calib=str(text_file), eval=str(text_file), **run)
    done = quick(tmp_path / "packed", toy, text_file, tmp_path / "out", rate=0.01, gain_rate=0.01)
    assert done.after < done.before
    record = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert len(record["changed"]) == 8
    assert record["evaluation"] is None
    assert record["tuned"]["evaluation_before"]["compressed"]["perplexity"] > 1
    assert any("other tensors" in line for line in examine(tmp_path / "out", toy, client=False))


def test_fewer_rows_where_memory_is_short(
    toy: Path, packed: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = quick(packed, toy, text_file, tmp_path / "expected")
    real, most = Student.block, [3]

    def small(self: Any, block: int, hidden: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        if shape[0] > most[0] and block == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, block, hidden, shape)

    monkeypatch.setattr(Student, "block", small)
    done = quick(packed, toy, text_file, tmp_path / "out")
    assert done.after == pytest.approx(expected.after, rel=1e-3)
    assert done.notes[0] == "out of memory with 7 rows at once: 3 from there on"
    most[0] = 0
    with pytest.raises(CompressError, match="one row of 32 tokens"):
        quick(packed, toy, text_file, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_predictions_that_are_no_numbers(
    toy: Path, packed: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Student.block
    monkeypatch.setattr(Student, "block", lambda self, *given: real(self, *given) * float("nan"))
    with pytest.raises(CompressError, match="nan in float32"):
        quick(packed, toy, text_file, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def slopes_of(toy: Path, packed: Path, dtype: torch.dtype) -> Slopes:
    cpu = torch.device("cpu")
    student = Student(load(Weights(Checkpoint.open(packed)), dtype, cpu, False))
    return Slopes(load(Weights(Checkpoint.open(toy)), dtype, cpu, False), student)


def test_gradients_are_those_of_the_whole_models(toy: Path, packed: Path) -> None:
    """Piece by piece and block by block, as autograd finds them through everything at once."""
    tokens = torch.randint(300, (5, 24), generator=torch.Generator().manual_seed(0))
    slopes = slopes_of(toy, packed, torch.float32)
    student, teacher, shape = slopes.student, slopes._teacher, (5, 24)
    with torch.no_grad():
        for factor in student.factors:
            factor.mul_(1 + 0.05 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(factor.numel())))
    theirs, ours = teacher.embed(tokens), student.model.embed(tokens)
    for block in range(len(teacher.block_names)):
        theirs = teacher.run(block, theirs, shape)
        ours = student.block(block, ours, shape)
    wanted, found = (m.predict(h, tokens).log_softmax(-1) for m, h in ((teacher, theirs), (student.model, ours)))
    off = torch.nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    expected = torch.autograd.grad(off.sum(), student.factors)
    assert torch.allclose(slopes.divergence(tokens), off, atol=1e-5)
    for part in (tokens[:2], tokens[2:4], tokens[4:]):
        slopes.add(part, 3.0)
    assert len(slopes.sums) == len(expected) > 28
    for total, slope in zip(slopes.sums, expected, strict=True):
        assert float(slope.norm()) > 0
        assert float((total / 3 - slope).norm() / slope.norm()) < 1e-4
    slopes.drop()
    assert not any(bool(total.any()) for total in slopes.sums)


def test_the_original_is_let_go_with_its_last_use(toy: Path, packed: Path) -> None:
    """Its memory is for the client; a cycle would keep it until Python looks for cycles."""
    slopes = slopes_of(toy, packed, torch.float32)
    slopes.divergence(torch.zeros(1, 8, dtype=torch.int64))
    teacher = weakref.ref(slopes._teacher)
    slopes.close()
    gc.collect()
    gc.disable()
    try:
        del slopes
        assert teacher() is None
    finally:
        gc.enable()


def test_float16_loses_no_gradient(toy: Path, packed: Path) -> None:
    """Of a mean over as many tokens as a step has: nearly that of float32, none of them 0."""
    found = []
    tokens = torch.randint(300, (8, 32), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float16):
        slopes = slopes_of(toy, packed, dtype)
        assert torch.isfinite(slopes.divergence(tokens)).all()
        tuning._differentiate(slopes, tokens.repeat(16, 1), 128)
        mine = {id(x.factor) for x in slopes.student.scaled.values()}
        sums = zip(slopes.student.factors, slopes.sums, strict=True)
        found.append(torch.cat([total.flatten() for factor, total in sums if id(factor) in mine]) / tuning._STRETCH)
    assert float(torch.cosine_similarity(found[0], found[1], 0)) > 0.9999


def test_a_model_without_gains(tmp_path: Path, tokenizer: Any, make_model: Any, text_file: Path) -> None:
    from transformers import OlmoConfig

    config = OlmoConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    source = make_model(config, tmp_path / "olmo", tokenizer)
    compress.run(source, RTN(3, 16), tmp_path / "packed", calib=str(text_file), **RUN)
    assert quick(tmp_path / "packed", source, text_file, tmp_path / "out").packed == 14
    with pytest.raises(CompressError, match="no gains"):
        quick(tmp_path / "packed", source, text_file, tmp_path / "none", rate=0.0)


def test_blocks_of_another_run_are_not_thrown_away(toy: Path, packed: Path, text_file: Path, tmp_path: Path) -> None:
    """A run that was stopped left them where tuning would begin anew; its own are worth nothing."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "fingerprint.json").write_text('{"method": {}}')
    (partial / "block-00000.json").write_text("{}")
    with pytest.raises(CompressError, match="another run"):
        quick(packed, toy, text_file, tmp_path / "out")
    assert (partial / "block-00000.json").exists()
    (partial / "fingerprint.json").write_text('{"tune": {}}')
    quick(packed, toy, text_file, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    assert not partial.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu(tmp_path: Path) -> None:
    """In bfloat16, the bundled model at 2 bits: nearer after a few steps, verified, loaded by its client; the same
    bytes a second time."""
    run: dict[str, Any] = {"calib": "bundled", "samples": 64, "seq_len": 512, "device": "cuda"}
    compress.run("bundled", GPTQ(2, 64), tmp_path / "packed", no_eval=True, no_client=True, **run)
    original = api.find_model("bundled")
    done, again = (
        tuning.run(tmp_path / "packed", original, compress.Options(**run), tmp_path / name, Tuning(steps=20))
        for name in ("out", "again")
    )
    assert done.after < 0.97 * done.before
    assert done.notes == [], "a step that cannot be captured, for one"
    assert done.proof is not None
    assert done.proof.layers == 28
    assert again.after == done.after
    assert (again.out / "model.safetensors").read_bytes() == (done.out / "model.safetensors").read_bytes()
