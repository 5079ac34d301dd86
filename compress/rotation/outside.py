"""What stands outside the blocks in rotated coordinates: embeddings, the final norm and the head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.blocks import BlockModel
from compress.errors import CompressError
from compress.folding.edges import gain_offset
from compress.folding.tap import parts_of
from compress.rotation.asked import INSTEAD, ROWS, TOKENS, TOLERANCE, Made
from compress.rotation.matrices import Orthogonal
from compress.rotation.roles import refuse_norm

#: rows of embeddings and head that are in float64 at the same time
_AT_ONCE = 8192


@torch.no_grad()
def rotate_outside(model: BlockModel, matrix: Orthogonal | None) -> Made:
    """Rotate what stands outside the blocks, and prove it. Raises CompressError for what cannot be rotated."""
    assert matrix is not None
    model.prepare()
    whole, device = model.model, model.device
    enter, leave = whole.get_input_embeddings(), whole.get_output_embeddings()
    names, norm, norm_param, offset = final_norm(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(enter.weight), (ROWS, TOKENS), generator=generator)
    states = torch.randn(ROWS, TOKENS, model.hidden_size, generator=generator).to(device)
    entered, logits = model.embed(tokens), model.logits(states, tokens)
    tied = leave.weight is enter.weight
    if tied:
        leave.weight = nn.Parameter(enter.weight.data.clone(), requires_grad=False)
    stored_names = [parts_of(model, names[0])[0], (parts_of(model, names[1]) or [names[1]])[0]]
    dtypes = [model.weights.dtype(n) for n in (stored_names[0], stored_names[0] if tied else stored_names[1])]
    gain = norm.data.double() + offset
    made = Made({}, {"name": "", "untied": tied, "gains": 1, "readers": 0, "writers": 0, "heads": 0})
    made.tensors[stored_names[0]] = _by_rows(enter.weight.data, matrix.times, dtypes[0])
    made.tensors[stored_names[1]] = _by_rows(leave.weight.data, lambda rows: matrix.times(rows * gain), dtypes[1])
    norm.data.fill_(1 - offset)
    made.tensors[norm_param] = norm.data.to(model.weights.dtype(norm_param)).cpu()
    errors = [
        _share(model.embed(tokens), matrix.times(entered)),
        _share(model.logits(matrix.times(states).float(), tokens), logits),
    ]
    for error, what in zip(errors, ("what enters block 0", "the logits"), strict=True):
        if not error <= TOLERANCE:
            said = f"with rotated embeddings, norm and head {what} moves by {error:.0e}, {TOLERANCE:.0e} is allowed"
            raise CompressError(said, type(whole).__name__, INSTEAD)
    head = made.tensors[stored_names[1]]
    added = 0 if stored_names[1] in model.weights.checkpoint.tensors else head.nbytes
    made.record |= {"added_bytes": added, "error": max(errors), "rounding": None}
    if tied:
        what = f"{stored_names[1]} is no longer tied to the embeddings: it took the final norm's gain"
        made.notes.append(f"{what}, which adds {added} bytes ({added / 1e9:.2f} GB); --no-residual keeps it tied")
    model.rest()
    return made


def final_norm(model: BlockModel) -> tuple[list[str], nn.Parameter, str, float]:
    """What stands outside the blocks, which must be no more than embeddings, an RMSNorm and a head.

    Returns:
        the parameters of embeddings and head; the norm's gain, its name on disk and its offset.

    Raises:
        CompressError: it is something else.
    """
    whole = model.model
    leave = whole.get_output_embeddings()
    place = {id(m): n for n, m in whole.named_modules()}
    if leave is None or id(leave) not in place:
        raise CompressError("no output head was found", type(whole).__name__, INSTEAD)
    head = place[id(leave)]
    names = [f"{place[id(whole.get_input_embeddings())]}.weight", f"{head}.weight"]
    inside = model.block_names[0].rpartition(".")[0] + "."
    others = [p for p in model.parts if not p.startswith(inside) and p not in (*names, f"{head}.bias")]
    for param in others:
        owner = whole.get_submodule(param.rpartition(".")[0])
        weight = owner._parameters.get("weight")
        if weight is not None and weight.dim() == 1:
            refuse_norm(param.rpartition(".")[0], owner, gain_offset(owner))
    norms = [p for p in others if whole.get_parameter(p).shape == (model.hidden_size,)]
    if len(others) != 1 or len(norms) != 1:
        what = f"{len(others)} tensors stand outside the blocks beside embeddings and head, not one RMSNorm's gain"
        raise CompressError(what, next((o for o in others if o not in norms), str(model.weights.folder)), INSTEAD)
    offset = gain_offset(whole.get_submodule(norms[0].rpartition(".")[0]))
    assert offset is not None
    return names, whole.get_parameter(norms[0]), parts_of(model, norms[0])[0], offset


def _by_rows(data: Tensor, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """Change a float32 matrix in place, some rows at a time; returns the result rounded once to `dtype`, on the CPU."""
    stored = torch.empty(data.shape, dtype=dtype)
    for start in range(0, len(data), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        new = change(data[rows].double())
        data[rows] = new.float()
        stored[rows] = new.to(dtype).cpu()
    return stored


def _share(now: Tensor, want: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((now - want).abs().max() / want.abs().max())
