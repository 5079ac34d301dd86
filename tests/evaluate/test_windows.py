"""Which tokens are predicted, from which context: against the transformers guide's own loop."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.evaluate.windows import make_windows


@pytest.mark.parametrize(
    ("total", "window", "stride"), [(100, 16, 4), (101, 16, 16), (97, 16, 5), (9, 16, 4), (2, 8, 1)]
)
def test_strided_as_the_guide_does(total: int, window: int, stride: int) -> None:
    tokens = torch.randperm(1000)[:total]
    made = make_windows(tokens, window, stride)
    expected, before = [], 0
    for begin in range(0, total, stride):
        end = min(begin + window, total)
        expected += [(begin, target) for target in range(max(before, begin + 1), end)]
        before = end
        if end == total:
            break
    found = [(int(made.starts[r]), int(made.starts[r]) + j + 1) for r, j in made.predictions.nonzero().tolist()]
    assert found == expected
    targets = [t for _, t in found]
    assert targets == sorted(set(targets))
    if stride < window:
        assert targets == list(range(1, total)), "every token but the first, once"
    for r, j in made.predictions.nonzero().tolist():
        begin = int(made.starts[r])
        assert made.rows[r, : j + 2].tolist() == tokens[begin : begin + j + 2].tolist()
        first, last = made.columns(r)
        assert first <= j < last


def test_side_by_side_drops_the_tail() -> None:
    made = make_windows(torch.arange(70), 16)
    assert made.rows.tolist() == torch.arange(64).reshape(4, 16).tolist()
    assert made.predictions.sum() == 4 * 15
    assert made.positions.all()
    sizes = torch.arange(70) + 1
    counted = made.target_bytes(sizes)
    assert counted.sum() == sizes[:64].sum() - sizes[[0, 16, 32, 48]].sum(), "first tokens and the tail are not in it"


def test_limits() -> None:
    tokens = torch.arange(70)
    assert len(make_windows(tokens, 16, most=2).rows) == 2
    assert len(make_windows(tokens, 16, 4, most=3).rows) == 3
    for given, says in (
        ((tokens, 16, 17), "--stride"),
        ((tokens, 16, 0), "--stride"),
        ((tokens, 16, None, 0), "--windows"),
        ((tokens, 71), "70 tokens, one window needs 71"),
        ((tokens[:1], 16, 4), "1 tokens"),
    ):
        with pytest.raises(compress.CompressError, match=says):
            make_windows(*given)
