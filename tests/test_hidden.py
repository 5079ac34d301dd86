"""The three places for hidden states hold the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import psutil
import pytest
import torch

from compress.hidden import HiddenStates, batch_rows, choose_tier

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_put_get(tier: Literal["device", "host", "disk"], dtype: torch.dtype, tmp_path: Path) -> None:
    states = HiddenStates(0, CPU, tmp_path / "spill", tier)
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


def test_disk_refuses_another_shape(tmp_path: Path) -> None:
    states = HiddenStates(0, CPU, tmp_path / "spill", "disk")
    states.put(0, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="changed its shape"):
        states.put(0, torch.zeros(3, 3))


def test_tier_follows_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    available = psutil.virtual_memory().available
    assert choose_tier(available // 10, CPU) == "host"
    assert choose_tier(available, CPU) == "disk"


def test_batches_are_powers_of_two_within_rows() -> None:
    assert batch_rows(1, 128, 64, 256, CPU) == 1
    assert batch_rows(100, 128, 64, 256, CPU) == 32
    assert batch_rows(100, 8192, 64, 256, CPU) == 1
    assert batch_rows(100, 128, 10**9, 10**9, CPU) == 1


def test_run_from_disk_equals_run_from_memory(
    toy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import compress
    from compress import hidden

    def digests(name: str) -> list[str]:
        result = compress.run(
            toy, compress.GPTQ(bits=3, group_size=32), tmp_path / name, calib=str(text_file), samples=8, seq_len=48,
            no_eval=True,
        )  # fmt: skip
        return [r["sha256_dense"] for r in result.records]

    in_memory = digests("a")
    monkeypatch.setattr(hidden, "choose_tier", lambda nbytes, device: "disk")
    assert digests("b") == in_memory
