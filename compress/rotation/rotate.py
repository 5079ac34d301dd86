"""Write a checkpoint whose weights are rotated and whose function is the same, one decoder block at a time.

QuaRot (Ashkboos et al. 2024) and SpinQuant (Liu et al. 2024) rotate activations so that outliers spread over all
channels. Of their rotations the two that can be folded into weights are made here:

- R1, of the residual stream x <- x R1: each RMSNorm's gain g goes into the layers that read it (W <- W diag(g), gain
  1), then embeddings E <- E R1, readers W <- W R1, writers W <- R1^T W, their biases b <- b R1; the head takes the
  final norm's gain and reads the rotated stream;
- R2, of each value head: v_proj's rows W <- R2^T W and bias b <- b R2, o_proj's columns W <- W R2. Query heads that
  share a value head share R2.

The online rotations of the papers (R3, R4) would need a run time of their own and are not made. SpinQuant learns R1 and
R2; here they are random, as QuaRot's. Products are taken in float64 and rounded once, to the stored dtype.

What gains by it is what quantises activations, or rounds with their statistics (GPTQ). Round-to-nearest alone may lose:
with the gains folded, the few channels that are large before a norm's gain makes them small meet rounding errors of
full size in every layer.

Nothing is taken on trust: a block is run in float32 on random hidden states before and after, and so are the embeddings
and the head; where the rotated output is not the rotation of the output, nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.asking import ask
from compress.blocks import BlockModel, all_finite
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.evaluate.states import final_states
from compress.formats import FORMATS
from compress.journal import Journal, check_output
from compress.output import assemble, room_needed, seal
from compress.pipeline import open_dense
from compress.plan import check_room
from compress.rotation.asked import TOKENS, Rotation
from compress.rotation.blocks import looked_at, rotate_block
from compress.rotation.matrices import Orthogonal, rotation
from compress.rotation.outside import rotate_outside
from compress.verify import Proof, digest, verify
from compress.weights import Weights
from compress.writer import write_text

Step = Callable[[int, int], None]


@dataclass
class Rotated:
    """What a rotation did.

    Attributes:
        residual: which R1 was used, in words; "" for none.
        blocks: decoder blocks.
        gains: norms whose gain was folded, the final one among them.
        readers, writers: matrices that read or write the residual stream, each expert's counted; embeddings and head
            are not among them.
        heads: key-value heads that were rotated, in all blocks.
        added_bytes: by which the checkpoint grew because the head is no longer tied to the embeddings.
        largest_error: in the proofs in float32: how far a block's output was from the rotation of the original's, as a
            share of what the block adds to the stream; of embeddings and logits, as a share of the largest.
        rounding_error: the same for a block's weights as they are stored; None where 16 bits rounded nothing.
        logits_change: of the written files, in float32, on random tokens: relative to the norm of the original's
            logits; None where it was not measured.
        notes: what else must be said.
        proof: what was read back; None where that was not wanted.
    """

    out: Path
    settings: Rotation
    residual: str
    blocks: int
    gains: int = 0
    readers: int = 0
    writers: int = 0
    heads: int = 0
    added_bytes: int = 0
    largest_error: float = 0.0
    rounding_error: float | None = None
    logits_change: float | None = None
    notes: list[str] = field(default_factory=list)
    proof: Proof | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        proof = None if self.proof is None else {**vars(self.proof), "clients": list(self.proof.clients)}
        return {**vars(self), "out": str(self.out), "settings": asdict(self.settings), "proof": proof}


def rotate(
    source: Path,
    out: Path,
    settings: Rotation | None = None,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    check: bool = True,
    client: bool = True,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    step: Step = lambda done, total: None,
) -> Rotated:
    """Write the rotated checkpoint of `source` to `out`: an ordinary dense model in the source's dtypes.

    A run that is stopped goes on where it was; nothing stands under the final name before all is written.

    Args:
        settings: default: both rotations by Hadamard matrices.
        fresh: start over instead of going on with a stopped run.
        check: read the result back, and measure how far its logits are from the original's.
        client: and load it through transformers.
        device: where blocks run and products are taken.
        step: called with (blocks done, blocks in all; embeddings and head count as one).

    Raises:
        CompressError: a model whose function would not stay the same (what stands in the way is named), or anything
            else that a user can mend.
    """
    settings, device, dense = settings or Rotation(), device or torch.device("cpu"), FORMATS["dense"]
    check_output(out, overwrite, source)
    weights = Weights(open_dense(source, allow_pickle, out.with_name(out.name + ".unpickled")))
    if weights.packed:
        what = f"{len(weights.packed)} of its layers are quantised, and codes cannot be rotated"
        raise CompressError(what, str(source), "pass the original model, and quantise the rotated one")
    model = BlockModel(weights, torch.float32, device, trust_remote_code, lean=True)
    matrix = rotation(model.hidden_size, settings.kind, settings.seed) if settings.residual else None
    first = 0 if matrix is None else 1  # the place of block 0, behind embeddings and head
    total = first + len(model.block_names)
    check_room(out, room_needed(out, dense, sum(t.nbytes for t in weights.checkpoint.tensors.values())))
    known = looked_at(model, settings)
    with Journal(out, overwrite, source) as journal:
        print_of = {"rotate": asdict(settings), "checkpoint": weights.checkpoint.fingerprint()}
        ready = journal.start(lambda: {**print_of, "torch": torch.__version__}, fresh)
        for number in range(total):
            if number >= ready:
                outside = matrix is not None and number == 0
                made = (
                    rotate_outside(model, matrix)
                    if outside
                    else rotate_block(model, number - first, settings, matrix, known)
                )
                shas = {name: _sha(name, value) for name, value in made.tensors.items()}
                journal.add(number, made.tensors, [made.record], shas, made.notes)
                del made
            step(number + 1, total)
        records, changed, notes = journal.everything(total)
        done = _summed(out, settings, matrix, model, records, notes)
        stored = {n: s for i in range(total) for n, s in journal.tensors(i, check=i < ready).items()}
        config = _untied(weights.checkpoint.config) if any(r["untied"] for r in records) else weights.checkpoint.config
        new = Checkpoint(weights.folder, config, {**weights.checkpoint.tensors, **stored})
        hashes = assemble(journal.final, dense, {}, new, {}, {}, [journal.written(i) for i in range(total)])
        if check:
            done.proof = verify(journal.final, [], new, trust_remote_code, changed, owned=(), hashes=hashes)
            if client:
                answer = ask(journal.final, None, device, trust_remote_code).line()
                done.proof = Proof(**{**vars(done.proof), "clients": (answer,)})
            done.logits_change = _logits_change(weights, journal.final, device, trust_remote_code, journal.folder)
        _finish(journal.final, source, done, sorted(changed), records, hashes)
        journal.publish()
    return done


def _sha(name: str, value: Tensor) -> str:
    """sha256 of a tensor that is to be stored. Raises CompressError for what its dtype cannot hold."""
    if not bool(all_finite(value)):
        what = f"with a norm's gain in it, it overflows {str(value.dtype).removeprefix('torch.')}"
        raise CompressError(what, name, "store the model in bfloat16 or float32 first")
    return digest(value)


def _summed(
    out: Path,
    settings: Rotation,
    matrix: Orthogonal | None,
    model: BlockModel,
    records: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> Rotated:
    """What the blocks' records say together. Raises CompressError when nothing was rotated."""
    done = Rotated(out, settings, "" if matrix is None else matrix.words, len(model.block_names), notes=list(notes))
    for name in ("gains", "readers", "writers", "heads", "added_bytes"):
        setattr(done, name, sum(r[name] for r in records))
    done.largest_error = max(r["error"] for r in records)
    rounded = [r["rounding"] for r in records if r["rounding"] is not None]
    done.rounding_error = max(rounded, default=None)
    if done.rounding_error is not None:
        done.notes.append(
            "rotated weights were rounded to 16 bits: that moves a block's output by at most "
            f"{done.rounding_error:.1e} of what the block adds to the residual stream"
        )
    without = [r["name"] for r in records if settings.heads and r["name"] and not r["heads"]]
    if len(without) == done.blocks and matrix is None:
        raise CompressError(
            "no block has value heads that could be rotated", str(model.weights.folder), "leave --no-residual out"
        )
    if without:
        what = "no pair of layers was found between which a rotation of each value head changes nothing"
        done.notes.append(f"value heads of {len(without)} blocks ({without[0]}, ...) were not rotated: {what}")
    if model.unexpected and matrix is not None:
        what = f"{len(model.unexpected)} tensors that the model does not use (first {model.unexpected[0]}) were copied"
        done.notes.append(f"{what} as they are: where other code reads the stream with them, it must not here")
    return done


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose head is a tensor of its own."""
    inner = {k: _untied(v) for k, v in config.items() if k == "text_config" and isinstance(v, Mapping)}
    return {**config, **inner, "tie_word_embeddings": False}


def _logits_change(
    source: Weights, folder: Path, device: torch.device, trust_remote_code: bool, scratch: Path
) -> float:
    """Of the files, in float32 on random tokens: norm of the difference of the logits, relative to the original's."""
    found: list[Tensor] = []
    for weights in (source, Weights(Checkpoint.open(folder))):
        model = BlockModel(weights, torch.float32, device, trust_remote_code, lean=True)
        config = model.model.config.get_text_config()
        length = min(4 * TOKENS, int(getattr(config, "max_position_embeddings", None) or 4 * TOKENS))
        count = len(model.model.get_input_embeddings().weight)
        tokens = torch.randint(count, (1, length), generator=torch.Generator().manual_seed(1))
        flow = final_states(model, tokens, scratch / "hidden.bin", low_memory=True)
        found.append(model.logits(flow.states(0), flow.batch(0)).double().cpu())
        flow.close()
    return float((found[1] - found[0]).norm() / found[0].norm())


def _finish(
    folder: Path,
    source: Path,
    done: Rotated,
    changed: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    hashes: Mapping[str, str],
) -> None:
    """The record and the card."""
    from compress import __version__

    old_card = source / "README.md"
    card = old_card.read_text(encoding="utf-8", errors="replace") if old_card.is_file() else ""
    notes = "".join(f"\n- {note}" for note in done.notes)
    write_text(folder / "README.md", f"{card}\n## Rotated\n\n{_words(done)}\n{notes}\n")
    said = {k: v for k, v in done.as_json().items() if k not in ("out", "proof")}
    proof = None if done.proof is None else vars(done.proof)
    record: dict[str, Any] = {"compress": __version__, "format": "dense", "layers": [], "changed": list(changed)}
    seal(folder, record | {"rotation": said, "verified": proof, "blocks": list(records)}, hashes)


def _words(done: Rotated) -> str:
    stream = f"the residual stream by a {done.residual}" if done.residual else ""
    heads = f"{done.heads} value heads" if done.heads else ""
    what = (
        f"`compress rotate` rotated {' and '.join(x for x in (stream, heads) if x)}; the model's function is the same"
    )
    moved = (
        "" if done.logits_change is None else f": in float32 its logits move by {done.logits_change:.1e} of their norm"
    )
    return f"{what}{moved}."
