"""The three places for hidden states hold the same values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch

import compress
from compress import flows, hidden, passes, pipeline, stats, sums
from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.hidden import Activations, HiddenStates, batch_rows, choose_tier, row_bytes
from compress.types import Needs
from compress.weights import Weights

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_put_get(tier: Literal["device", "host", "disk"], dtype: torch.dtype, tmp_path: Path) -> None:
    states = HiddenStates(CPU, tmp_path / "spill", tier)
    first = [torch.randn(3 if i < 4 else 1, 5, 7).to(dtype) for i in range(5)]
    for i, value in enumerate(first):
        states.put(i, value)
    assert all(torch.equal(states.get(i), v) for i, v in enumerate(first))
    states.put(2, first[2] * 2)
    assert torch.equal(states.get(2), first[2] * 2)
    assert torch.equal(states.get(3), first[3])
    assert (tmp_path / "spill").exists() == (tier == "disk")
    states.close()
    assert not (tmp_path / "spill").exists()


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_what_was_on_its_way_is_replaced_too(tier: Literal["device", "host", "disk"], tmp_path: Path) -> None:
    """After `get(0)` batch 1 is on its way to the device already."""
    states = HiddenStates(CPU, tmp_path / "spill", tier)
    for i in range(3):
        states.put(i, torch.full((2, 3), float(i)))
    states.get(0)
    states.put(1, torch.full((2, 3), 7.0))
    assert [float(states.get(i)[0, 0]) for i in (1, 2, 0)] == [7.0, 2.0, 0.0]
    states.close()


def test_disk_refuses_another_shape(tmp_path: Path) -> None:
    states = HiddenStates(CPU, tmp_path / "spill", "disk")
    states.put(0, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="changed its shape"):
        states.put(0, torch.zeros(3, 3))


GPU = torch.device("cuda")


def machine(gpu: int, host: int) -> Callable[[torch.device], int]:
    """A machine with so many bytes free."""
    return lambda device: gpu if device.type == "cuda" else host


@pytest.mark.parametrize(
    ("gpu", "host", "held", "low_memory", "tier"),
    [
        (1000, 1000, None, False, "device"),
        (280, 1000, None, False, "host"),  # a third of what is free, where nobody says what a block needs
        (280, 1000, 100, False, "device"),  # 90% of 280, less 100, where somebody does
        (280, 1000, 160, False, "host"),
        (1000, 1000, 100, True, "host"),
        (280, 190, None, False, "disk"),
        (1000, 190, 0, True, "disk"),
        (0, 10**6, 0, False, "host"),
    ],
)
def test_tier_on_a_gpu(gpu: int, host: int, held: int | None, low_memory: bool, tier: str) -> None:
    """For 98 bytes."""
    assert choose_tier(98, GPU, held, low_memory, machine(gpu, host)) == tier


@pytest.mark.parametrize("low_memory", [False, True])
def test_tier_on_a_cpu(low_memory: bool) -> None:
    assert choose_tier(98, CPU, 0, low_memory, machine(10**6, 1000)) == "host"
    assert choose_tier(98, CPU, 0, low_memory, machine(10**6, 190)) == "disk"
    available = psutil.virtual_memory().available
    assert choose_tier(available // 10, CPU) == "host"
    assert choose_tier(available, CPU) == "disk"


def test_batches_follow_free_memory() -> None:
    """16 thousand tokens on a GPU, a quarter of them for little memory, and what a quarter of the free memory holds."""
    row = row_bytes(2048, 4096, 11008)
    for gpu, low_memory, rows in (
        (10**12, False, 8),
        (10**12, True, 2),
        (4 * 5 * row, False, 4),
        (4 * row, False, 1),
        (row, True, 1),
    ):
        assert batch_rows(128, 2048, 4096, 11008, GPU, low_memory, machine(gpu, 0)) == rows
    assert batch_rows(128, 2048, 4096, 11008, CPU, False, machine(0, 10**12)) == 2


def test_batches_of_a_narrow_model() -> None:
    """More tokens, in no more memory than a wide one's; a CPU has no launches to wait for."""
    wide = row_bytes(2048, 4096, 11008)
    assert batch_rows(128, 2048, 576, 1536, GPU, False, machine(10**12, 0)) == 32
    assert batch_rows(128, 2048, 576, 1536, GPU, True, machine(10**12, 0)) == 8
    assert batch_rows(128, 2048, 8192, 28672, GPU, False, machine(10**12, 0)) == 8, "a wider one has no fewer"
    assert batch_rows(10**6, 128, 64, 256, GPU, False, machine(4 * wide, 0)) * row_bytes(128, 64, 256) <= wide
    assert batch_rows(128, 2048, 576, 1536, CPU, False, machine(0, 10**12)) == 2


def test_batches_are_powers_of_two_within_rows() -> None:
    assert batch_rows(1, 128, 64, 256, CPU) == 1
    assert batch_rows(100, 128, 64, 256, CPU) == 32
    assert batch_rows(100, 8192, 64, 256, CPU) == 1
    assert batch_rows(100, 128, 10**9, 10**9, CPU) == 1


SMALL: dict[str, Any] = {"samples": 8, "seq_len": 48, "no_eval": True, "device": "cpu"}


def digests(result: Any) -> list[str]:
    return [r["sha256_dense"] for r in result.records]


def test_run_from_disk_equals_run_from_memory(
    toy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows, "batch_rows", lambda *given: 2)
    method = compress.GPTQ(bits=3, group_size=32)
    in_memory = compress.run(toy, method, tmp_path / "a", calib=str(text_file), **SMALL)
    assert in_memory.room["hidden_states"] == "host"
    monkeypatch.setattr(hidden, "choose_tier", lambda *given: "disk")
    on_disk = compress.run(toy, method, tmp_path / "b", calib=str(text_file), **SMALL)
    assert on_disk.room["hidden_states"] == "disk"
    assert digests(on_disk) == digests(in_memory)


# --- out of memory


class Small:
    """A device whose memory takes `most` rows in a block, or in a Hessian's product."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int, where: str = "block", error: Any = None) -> None:
        self.failed: list[int] = []
        self.most = most
        self._error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        run, traced, accumulate = BlockModel.run, BlockModel.traced, sums.accumulate

        def block(model: BlockModel, number: int, states: torch.Tensor, shape: Any) -> torch.Tensor:
            self._take(len(states))
            return run(model, number, states, shape)

        def there_and_back(model: BlockModel, number: int, states: torch.Tensor, shape: Any) -> torch.Tensor:
            self._take(len(states))
            return traced(model, number, states, shape)

        def product(total: torch.Tensor, x: torch.Tensor, *more: Any) -> None:
            accumulate(total, x, *more)  # fails when the sum has been changed already
            self._take(len(x))

        if where == "block":
            monkeypatch.setattr(BlockModel, "run", block)
            monkeypatch.setattr(BlockModel, "traced", there_and_back)
        else:
            monkeypatch.setattr(sums, "accumulate", product)

    def _take(self, rows: int) -> None:
        if rows > self.most:
            self.failed.append(rows)
            raise self._error


@pytest.mark.parametrize("where", ["block", "product"])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_out_of_memory_halves_the_batch(
    toy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, most: int
) -> None:
    """The run ends as one that had so many rows at once from the beginning, to the last bit, and says so once."""
    method = compress.GPTQ(bits=3, group_size=32)
    with monkeypatch.context() as patch:
        patch.setattr(flows, "batch_rows", lambda *given: most)
        wanted = compress.run(toy, method, tmp_path / "a", calib=str(text_file), **SMALL)
    small = Small(monkeypatch, most, where)
    result = compress.run(toy, method, tmp_path / "b", calib=str(text_file), **SMALL)
    assert small.failed == {1: [8, 4, 2], 2: [8, 4], 4: [8]}[most], "each size is tried once in the whole run"
    assert digests(result) == digests(wanted)
    assert [r["tokens"] for r in result.records] == [8 * 48] * 28
    assert result.notes == [f"out of device memory with {n} rows at once: {n // 2} from there on" for n in small.failed]
    assert (result.room["batch_rows"], result.room["rows_at_once"]) == (8, most)
    assert "out of device memory with 8 rows at once" in (tmp_path / "b" / "README.md").read_text()


def test_out_of_memory_in_a_later_batch_counts_no_token_twice(toy: Path, tmp_path: Path) -> None:
    """Batches 0 and 1 are in the sums when batch 2 fails: all begin anew."""
    tokens = torch.randint(0, 300, (12, 48), generator=torch.Generator().manual_seed(0))

    def collected(patch: pytest.MonkeyPatch, size: int, fails: bool) -> tuple[list[Any], Activations]:
        model = BlockModel(Weights(Checkpoint.open(toy)), torch.float32, CPU)
        flow = Activations(model, tokens, size, tmp_path / "spill")
        flow.enter()
        model.load(0)
        if fails:
            run, calls = BlockModel.run, [0]

            def third(*given: Any) -> Any:
                calls[0] += 1
                if calls[0] == 3:
                    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
                return run(*given)

            patch.setattr(BlockModel, "run", third)
        return stats.collect(model, 0, model.linears(0), flow, Needs(hessian=True, ranges=True)), flow

    with pytest.MonkeyPatch.context() as patch:
        found, flow = collected(patch, 4, True)
    with pytest.MonkeyPatch.context() as patch:
        wanted, _ = collected(patch, 2, False)
    assert flow.rows == 2
    assert len(flow.told()) == 1
    assert not flow.told()
    for a, b in zip(found, wanted, strict=True):
        assert a.stats.tokens == b.stats.tokens == 12 * 48
        for name in ("hessian", "absmax", "mean_abs", "mean"):
            assert torch.equal(getattr(a.stats, name), getattr(b.stats, name))


def test_one_row_that_does_not_fit_is_an_error(
    toy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Small(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        compress.run(toy, compress.GPTQ(bits=4), tmp_path / "out", calib=str(text_file), **SMALL)
    assert small.failed == [8, 4, 2, 1]


def test_other_errors_are_not_taken_for_it(
    toy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Small(monkeypatch, 0, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        compress.run(toy, compress.GPTQ(bits=4), tmp_path / "out", calib=str(text_file), **SMALL)
    assert small.failed == [8, 8], "once more without slopes, which may be what failed"


# --- little memory


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each block that is compressed, whether anything outside the blocks is in memory when its turn comes."""
    seen: list[bool] = []
    solve = pipeline.compress_block

    def looked(model: BlockModel, *rest: Any) -> Any:
        blocks = model.block_names[0].rpartition(".")[0] + "."
        seen.append(any(not p.is_meta for n, p in model.model.named_parameters() if not n.startswith(blocks)))
        return solve(model, *rest)

    monkeypatch.setattr(pipeline, "compress_block", looked)
    return seen


def test_low_memory(
    toy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outside: list[bool]
) -> None:
    """Fewer rows at once, nothing outside the blocks while they are worked on; the same result for the same batches."""
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:4000])
    given = {**SMALL, "samples": 64, "no_eval": False, "eval": str(short), "calib": str(text_file)}
    method = compress.GPTQ(bits=3, group_size=32)
    plain = compress.run(toy, method, tmp_path / "a", **given)
    low = compress.run(toy, method, tmp_path / "b", low_memory=True, **given)
    assert (plain.room["batch_rows"], low.room["batch_rows"]) == (64, 16)
    assert outside == [True] * 4 + [False] * 4
    assert low.room["next_block"] == "cpu"
    monkeypatch.setattr(flows, "batch_rows", lambda *given: 16)
    same = compress.run(toy, method, tmp_path / "c", **given)
    assert digests(low) == digests(same)
    assert low.score is not None
    assert same.score is not None
    assert low.score.perplexity == pytest.approx(same.score.perplexity, rel=1e-6)


@pytest.mark.parametrize("name", ["head", "survey", "rescaled", "true sequential"])
def test_low_memory_finds_what_it_put_away(
    make_model: Any,
    tokenizer: Any,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outside: list[bool],
    name: str,
) -> None:
    """A head to compress, a survey that enters the model twice, transforms that run a shape of their own."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=320,
        max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = make_model(config, tmp_path / "model", tokenizer)
    methods: dict[str, tuple[Any, dict[str, Any]]] = {
        "head": (compress.GPTQ(bits=4, group_size=32), {"lm_head": True}),
        "survey": (passes.load("int8")(rule="paper", threshold=2.0), {}),
        "rescaled": (passes.load("awq")(), {}),
        "true sequential": (compress.GPTQ(bits=4, group_size=32), {"true_sequential": True}),
    }
    method, more = methods[name]
    monkeypatch.setattr(flows, "batch_rows", lambda *given: 4)
    given = {**SMALL, **more, "calib": str(text_file)}
    plain = compress.run(folder, method, tmp_path / "a", **given)
    low = compress.run(folder, method, tmp_path / "b", low_memory=True, **given)
    assert digests(low) == digests(plain)
    assert outside == {"head": [True] * 3 + [False, False, True]}.get(name, [True] * 2 + [False] * 2)
