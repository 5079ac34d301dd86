"""`compress tune`: a packed checkpoint's scales and norm gains learn the original's predictions, end to end.

A solver sees a layer, a refiner a block; what the model says in the end depends on all of them. With every code as it
is, the two numbers of which there are few enough not to be learned by heart, a scale a group and a gain a channel,
descend on the Kullback-Leibler divergence of the model's predictions from the original's on calibration rows. As in the
second phase of Chen et al., "EfficientQAT", 2024 (step sizes alone, trained end to end), but towards the original's
distribution in place of the text's next token, and with the best of some looks at held-out rows kept.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from compress.asking import ask, model_dtype
from compress.blocks import BlockModel
from compress.calibration import Rows
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.export import left_dense, packed_blocks, stored_dtype
from compress.formats import FORMATS
from compress.formats.base import Held
from compress.journal import Journal
from compress.options import Options
from compress.output import assemble, read_record, seal
from compress.tuning.asked import Tuning
from compress.tuning.scaled import with_factor
from compress.tuning.slopes import Slopes
from compress.tuning.whole import Student, load
from compress.verify import Proof, digest, verify
from compress.weights import Weights
from compress.writer import write_text

T = TypeVar("T")
Step = Callable[[int, int], None]

#: tokens of a step, on a GPU and on a CPU
_TOKENS, _TOKENS_CPU = 16384, 4096
#: bytes that the logits of rows that go through the model at once may take
_LOGITS = 1 << 30
_BETAS = 0.9, 0.99
#: times which gradients are taken, or float16 would lose those of a mean over thousands of tokens; a power of 2, which
#: changes no others
_STRETCH = 1024.0


@dataclass
class Tuned:
    """What was tuned.

    Attributes:
        layers: whose scales moved, of all packed ones.
        before, after: divergence from the original on held-out rows, nats a token.
        proof: what was verified; None where that was not wanted.
    """

    out: Path
    format: str
    layers: int
    packed: int
    before: float
    after: float
    notes: list[str] = field(default_factory=list)
    proof: Proof | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        proof = None if self.proof is None else {**vars(self.proof), "clients": list(self.proof.clients)}
        return {**vars(self), "out": str(self.out), "proof": proof}


def run(
    folder: Path, original: Path, options: Options, out: Path, settings: Tuning | None = None, **more: Any
) -> Tuned:
    """`tune` with what the options name: calibration rows, device, dtype.

    Args:
        folder, original: the packed checkpoint, and the model that it was made from.
        more: of `tune`.
    """
    from compress import api
    from compress.pipeline import default_dtype

    device, dtype = api.find_device(options.device), api.find_dtype(options.dtype)
    api.wake(device)
    source, dense = Weights(Checkpoint.open(folder)), Weights(Checkpoint.open(original))
    if not source.packed:
        raise CompressError("nothing in it is packed", str(folder), "compress it first")
    longest = api.context_length(original, options.trust_remote_code)
    tokenizer = api.load_tokenizer(original, options.trust_remote_code)
    rows = api.calibration(original, tokenizer, options, device, longest)
    chosen = dtype or default_dtype(model_dtype(dense), device)
    return tune(
        source, dense, rows, out, settings, dtype=chosen, device=device, trust_remote_code=options.trust_remote_code,
        **more,
    )  # fmt: skip


def tune(
    source: Weights,
    original: Weights,
    rows: Rows,
    out: Path,
    settings: Tuning | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    overwrite: bool = False,
    check: bool = True,
    client: bool = True,
    trust_remote_code: bool = False,
    step: Step = lambda done, total: None,
) -> Tuned:
    """Write the packed checkpoint `source` to `out` with scales and gains tuned: the same format, the same codes.

    Args:
        original: the model that it was made from.
        dtype: in which both compute.
        check: read the result back.
        client: and load it through its client.
        step: called with (steps done, steps in all).

    Raises:
        CompressError: nothing in `source` can be tuned, the two are not the same model, or anything else that a user
            can mend; nothing is left under the final name.
    """
    settings, device = settings or Tuning(), device or torch.device("cpu")
    if not source.packed:
        raise CompressError("nothing in it is packed", str(source.folder), "compress it first")
    _same_model(source, original)
    form = FORMATS[source.format_name or ""]
    with Journal(out, overwrite, source.folder) as journal:
        prints = {"checkpoint": source.checkpoint.fingerprint(), "original": original.checkpoint.fingerprint()}
        if "tune" not in (journal.earlier() or {"tune": None}):
            what = "holds the finished blocks of another run, which was stopped"
            raise CompressError(what, str(journal.folder), "go on with that one, remove them, or choose another -o")
        journal.start(lambda: {"tune": asdict(settings), **prints}, fresh=True)
        teacher = load(original, dtype, device, trust_remote_code)
        student = Student(load(source, dtype, device, trust_remote_code))
        if not student.scaled:
            what = "none of its layers has scales that can be tuned"
            raise CompressError(what, str(source.folder), "tune integer grids or tables without double quantisation")
        found = _descend(teacher, student, rows.tokens, settings, step)
        del teacher  # its room is for the client, which loads the result whole
        done = Tuned(out, form.name, len(student.scaled), len(source.packed), found.before, found.after, found.notes)
        if len(student.scaled) < len(source.packed):
            done.notes.append(f"{len(source.packed) - len(student.scaled)} packed layers stay as they are")
        if found.after >= found.before:
            done.notes.append("held-out rows bore nothing out: scales and gains stay as they were")
        blocks, scales = packed_blocks(student.model, source), stored_dtype(form, source)
        held: list[Held] = []
        for number, block in enumerate(blocks):
            tensors: dict[str, Tensor] = {}
            records = []
            for linear in block:
                packed = source.read_packed(linear.name)
                if linear.name in found.factors:
                    packed = with_factor(packed, found.factors[linear.name])
                parts = {f"{linear.name}.{s}": t for s, t in form.pack(packed).items()}
                tensors |= parts
                records.append(_record(linear.name, linear.shape, parts, packed.dequantize()))
                held.append(
                    Held(linear.name, linear.param.removesuffix(".weight"), linear.shape, packed.storage, scales)
                )
            mine = {n: found.gains[n].cpu() for n in student.gains_of(number) if n in found.gains}
            journal.add(number, tensors | mine, records, {n: digest(t) for n, t in mine.items()})
        own = any(x.own_forward for block in blocks for x in block)
        config = form.config(held, left_dense(student.model, held), own)
        records, changed, _ = journal.everything(len(blocks))
        stored = {n: s for block in range(len(blocks)) for n, s in journal.tensors(block).items()}
        files = [journal.written(block) for block in range(len(blocks))]
        owners = source.owners()
        hashes = assemble(journal.final, form, config, source.checkpoint, owners, stored, files)
        if check:
            done.proof = verify(
                journal.final, records, source.checkpoint, trust_remote_code, changed, owned=owners, hashes=hashes,
                device=device,
            )  # fmt: skip
            if client:
                answer = ask(journal.final, rows.tokens, device, trust_remote_code)
                done.proof = replace(done.proof, clients=(answer.line(),))
        _finish(journal.final, source.folder, done, settings, rows, records, changed, hashes)
        journal.publish()
    return done


def _same_model(source: Weights, original: Weights) -> None:
    """Raise CompressError unless one may be the other's original."""
    if original.packed:
        raise CompressError("its layers are packed", str(original.folder), "pass the model that it was made from")
    for name in sorted(source.packed):
        there, shape = original.shapes_cache().get(f"{name}.weight"), source.shapes_cache()[f"{name}.weight"]
        if there not in (shape, shape[::-1]):  # a Conv1D's is kept as [in, out]
            what = f"has no weight of {name} with {list(shape)} entries"
            raise CompressError(what, str(original.folder), "pass the model that it was made from")


class _Room:
    """How many rows go through both models at once: half as many from where the device has no memory for them.

    Args:
        once: how many at first.

    Attributes:
        notes: what must be said of it.
    """

    def __init__(self, slopes: Slopes, once: int, seq: int) -> None:
        self.notes: list[str] = []
        self._slopes, self._once, self._seq = slopes, once, seq

    def within(self, work: Callable[[Slopes, Tensor, int], T], tokens: Tensor) -> T:
        """What `work` makes of rows, so many at once; anew with fewer. Raises CompressError where one is too many."""
        while True:
            try:
                return work(self._slopes, tokens, self._once)
            except torch.OutOfMemoryError as error:
                if self._once == 1:
                    what = f"out of memory with one row of {self._seq} tokens at once"
                    remedy = "use a shorter --seq-len, a device with more memory, or --device cpu"
                    raise CompressError(what, str(self._slopes.sums[0].device), remedy) from error
            self.notes.append(f"out of memory with {self._once} rows at once: {self._once // 2} from there on")
            self._once //= 2
            gc.collect()  # only here is all that `work` made out of reach
            self._slopes.drop()
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Found:
    """The factors of layers and the gains that were best on held-out rows, none if no better than at first; the
    divergence there before and after; and what must be said."""

    factors: dict[str, Tensor]
    gains: dict[str, Tensor]
    before: float
    after: float
    notes: list[str]


def _descend(teacher: BlockModel, student: Student, tokens: Tensor, settings: Tuning, step: Step) -> _Found:
    """Tune on all rows but the last, which are held out."""
    count, seq = tokens.shape
    held = max(1, round(settings.held_out * count))
    if count - held < 1:
        raise CompressError(f"{count} calibration rows: nothing is left to learn from", "--samples", "use 2 or more")
    seen, apart = tokens[: count - held], tokens[count - held :]
    vocabulary = int(teacher.model.get_input_embeddings().weight.shape[0])
    tokens_a_step = _TOKENS if teacher.device.type == "cuda" else _TOKENS_CPU
    each = max(1, min(len(seen), tokens_a_step // seq))
    groups = [
        {"params": [x.factor for x in student.scaled.values()], "rate": settings.rate},
        {"params": list(student.gains.values()), "rate": settings.gain_rate},
    ]
    moving = [g for g in groups if g["params"] and g["rate"]]
    if not moving:
        raise CompressError("its norms have no gains, and scales are held", "--rate 0", "leave it out")
    optimizer = torch.optim.Adam(moving, betas=_BETAS, eps=1e-8 * _STRETCH)
    slopes = Slopes(teacher, student)
    for factor, total in zip(student.factors, slopes.sums, strict=True):
        factor.grad = total
    room = _Room(slopes, max(1, min(each, _LOGITS // (seq * vocabulary * 4))), seq)
    try:
        first = best = room.within(_divergence, apart)
        if not math.isfinite(first):
            what = f"its divergence from the original is {first} in {str(teacher.dtype).removeprefix('torch.')}"
            raise CompressError(what, str(student.model.weights.folder), "use --dtype float32, or bfloat16")
        factors: dict[str, Tensor] = {}
        gains: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(settings.seed)
        order: list[int] = []
        assert settings.looks is not None
        every = max(1, settings.steps // settings.looks)
        for i in range(settings.steps):
            if len(order) < each:
                order += torch.randperm(len(seen), generator=generator).tolist()
            now, order = order[:each], order[each:]
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * (1 - i / settings.steps)
            room.within(_differentiate, seen[now])
            optimizer.step()
            step(i + 1, settings.steps)
            if (i + 1) % every and i + 1 < settings.steps:
                continue
            found = room.within(_divergence, apart)
            if found < best:
                best = found
                gains = {n: x.detach().clone() for n, x in student.gains.items()} if settings.gain_rate else {}
                factors = {n: x.factor.detach().clone() for n, x in student.scaled.items()}
    finally:
        said = slopes.close()
    return _Found(factors, student.changed(gains), first, best, room.notes + said)


def _differentiate(slopes: Slopes, tokens: Tensor, once: int) -> None:
    """Leave `_STRETCH` times the gradient of the mean over some rows in `slopes.sums`."""
    for total in slopes.sums:
        total.zero_()
    for part in torch.split(tokens, once):
        slopes.add(part, _STRETCH / tokens.numel())


def _divergence(slopes: Slopes, tokens: Tensor, once: int) -> float:
    """Mean over some rows."""
    return float(torch.cat([slopes.divergence(part) for part in torch.split(tokens, once)]).double().mean())


def _record(name: str, shape: Sequence[int], stored: dict[str, Tensor], dense: Tensor) -> dict[str, Any]:
    nbytes = sum(t.nbytes for t in stored.values())
    bits = 8 * nbytes / (shape[0] * shape[1])
    return {
        "name": name, "shape": list(shape), "bytes": nbytes, "bits_per_weight": bits, "notes": [],
        "sha256_dense": digest(dense),
    }  # fmt: skip


def _words(done: Tuned, settings: Tuning, rows: Rows) -> str:
    return (
        f"The scales of {done.layers} packed layers and the gains of norms were tuned end to end in {settings.steps} "
        f"steps by `compress tune`, on {rows.source}; every code stayed. Divergence from the original on held-out rows "
        f"of it: {done.before:.4f} to {done.after:.4f} nats a token."
    )


def _finish(
    folder: Path, source: Path, done: Tuned, settings: Tuning, rows: Rows, records: list[dict[str, Any]],
    changed: dict[str, str], hashes: dict[str, str],
) -> None:  # fmt: skip
    """The record and the card: what the source's said, and what was tuned."""
    from compress import __version__

    earlier = {k: v for k, v in (read_record(source) or {}).items() if k != "sha256"}
    old_card = source / "README.md"
    card = old_card.read_text(encoding="utf-8", errors="replace") if old_card.is_file() else ""
    words = _words(done, settings, rows)
    said = {k: v for k, v in done.as_json().items() if k not in ("out", "proof")}
    proof = None if done.proof is None else vars(done.proof)
    tuned = said | {"settings": asdict(settings), "calibration": {"source": rows.source, "sha256": rows.sha256}}
    if done.after < done.before and earlier.get("evaluation") is not None:  # of the file that this was made from
        tuned["evaluation_before"], earlier["evaluation"] = earlier["evaluation"], None
        words += " What is said above of its predictions was measured before that."
    write_text(folder / "README.md", f"{card}\n## Tuned end to end\n\n{words}\n")
    earlier["changed"] = sorted({*(earlier.get("changed") or ()), *changed})
    record = {**earlier, "compress": __version__, "tuned": tuned, "verified": proof, "layers": records}
    seal(folder, record, hashes)
