"""A folder through the clients themselves: what transformers makes of it, beside our own reading of the same files.

Each client that reads the format and is installed here loads the whole model, once, if it fits in memory. It must find
every key it wants and none that it does not know, and its next-token distributions on a few rows must be those of our
own block-by-block evaluation of the files.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.evaluate.perplexity import final_states
from compress.skeleton import load_config, quiet_transformers
from compress.weights import Weights

#: rows and tokens a row that are compared
ROWS, TOKENS = 2, 64
#: KL divergence of the client's distributions from ours, in nats a token, that is still the same model: 16-bit sums in
#: another order
_SAME = 1e-3
#: clients round inputs to 8 bits in their own way (by 127 or by 127.5, through float16), so their noise is another than
#: ours: as many times the divergence that our own rounding of the inputs makes are allowed
_NOISE = 4.0
#: by format, what transformers needs to read it
_PACKAGES = {
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("optimum", "gptqmodel"),
    "gptq_v2": ("optimum", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "gguf": ("gguf",),
    "native": (),
    "dense": (),
}
_FULL = 0.7  # of the free memory, at most


@dataclass(frozen=True)
class Answer:
    """What a client said.

    Attributes:
        client: with its version.
        kl: of its distributions from ours, nats a token; None when it was not asked.
        top1: share of positions with the same most likely token.
        reason: why it was not asked.
    """

    client: str
    kl: float | None = None
    top1: float | None = None
    reason: str = ""

    def line(self) -> str:
        """One line for the report."""
        if self.kl is None or self.top1 is None:
            return f"{self.client} was not asked: {self.reason}"
        same = f"KL from our reading {self.kl:.1e}, top-1 {self.top1:.0%}"
        return f"{self.client} loads it, no key missing or unknown; {same}"


def ask(folder: Path, tokens: Tensor | None, device: torch.device, trust_remote_code: bool = False) -> Answer:
    """Load a folder through transformers and compare with our own reading.

    Args:
        tokens: int64 [rows, seq], of which a few are taken; None for seeded random ids.

    Raises:
        CompressError: it does not load, a key is missing or unknown, or its distributions are others.
    """
    import transformers

    weights = Weights(Checkpoint.open(folder))
    in_gguf = weights.checkpoint.files()[0].suffix == ".gguf"  # which may hold nothing that is packed
    format = "gguf" if in_gguf else weights.format_name or "dense"
    client = f"transformers {transformers.__version__}"
    absent = [p for p in _PACKAGES[format] if importlib.util.find_spec(p) is None]
    if absent:
        return Answer(client, reason=f"it needs {' and '.join(absent)}, not installed here")
    # GGUF's scales are float16 and its readers multiply in float32: a 16-bit dtype would round the products twice
    dtype = torch.float32 if format == "gguf" else model_dtype(weights)
    place, needed, free = _place(weights, dtype, device)
    if place is None:
        return Answer(
            client, reason=f"the model takes {needed / 1e9:.1f} GB in one piece, {free / 1e9:.1f} GB are free"
        )
    model = BlockModel(weights, dtype, place, trust_remote_code)
    rows, unknown = _rows(tokens, model, folder, trust_remote_code), set(model.unexpected)
    ours = _ours(model, rows)
    allowed = _SAME
    if any(weights.activations(x) for x in weights.packed):
        plain = _ours(BlockModel(_PlainInputs(weights.checkpoint), dtype, place, trust_remote_code), rows)
        allowed = max(_SAME, _NOISE * divergence(ours, plain))
    del model
    gc.collect()
    theirs = _theirs(folder, format, rows, dtype, place, trust_remote_code, unknown)
    kl = divergence(ours, theirs)
    top1 = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    if not kl <= allowed:
        what = f"{client} computes something else than the files hold: KL {kl:.2g} nats a token, top-1 {top1:.0%}"
        raise CompressError(what, str(folder), "do not use these files there; --no-verify keeps them all the same")
    return Answer(client, kl, top1)


class _PlainInputs(Weights):
    """A checkpoint whose layers take their inputs as they are."""

    def activations(self, layer: str) -> str:
        return ""


def _ours(model: BlockModel, rows: Tensor) -> Tensor:
    """float32 logits [rows, seq, vocab], streamed block by block."""
    with tempfile.TemporaryDirectory(prefix="compress-ask-") as scratch:
        flow = final_states(model, rows, Path(scratch) / "states")
        out = torch.cat([model.logits(flow.states(i), flow.batch(i)).cpu() for i in range(len(flow))])
        flow.close()
    return out


def divergence(ours: Tensor, theirs: Tensor) -> float:
    """Mean KL divergence of the second's next-token distributions from the first's, in nats; of logits [..., vocab]."""
    log_p, log_q = F.log_softmax(ours.double(), -1), F.log_softmax(theirs.double(), -1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp(min=0))


def _theirs(
    folder: Path,
    format: str,
    rows: Tensor,
    dtype: torch.dtype,
    place: torch.device,
    trust_remote_code: bool,
    unknown: set[str],
) -> Tensor:
    """float32 logits [rows, seq, vocab] of the client."""
    from transformers import AutoModelForCausalLM

    if format == "native":
        import compress.integration  # noqa: F401  # what `import compress` brings into transformers
    more: dict[str, Any] = {}
    if format == "gguf":
        more["gguf_file"] = next(folder.glob("*.gguf")).name
        config = load_config(folder, trust_remote_code)
        if config.model_type != "mistral":  # it takes none for that; for others it would lose rope scaling on its way
            more["config"] = config
    remedy = "this client cannot use it: choose another --format, or --no-verify keeps it all the same"
    silent = contextlib.redirect_stderr(io.StringIO())  # the clients' own progress bars
    with quiet_transformers("transformers does not load it", str(folder), remedy), silent:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": str(place)} if place.type == "cuda" else None,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **more,
        )
        for what, keys in info.items():
            found = sorted({str(k) for k in keys} - unknown)
            if found:
                raise CompressError(f"transformers: {what} {found[0]} and {len(found) - 1} more", str(folder), remedy)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would round block maxima to bfloat16
                module.support_avx512bf16_for_cpu = False
        with torch.no_grad():
            out = torch.cat([model.eval()(row[None].to(place), use_cache=False).logits.float().cpu() for row in rows])
    del model
    gc.collect()
    return out


def _bundled(folder: Path, trust_remote_code: bool) -> Tensor | None:
    """int64 [n]: some bundled text in the model's own tokens; None where its tokenizer is not there."""
    from compress.api import load_tokenizer
    from compress.assets import folder as assets

    try:
        tokenizer = load_tokenizer(folder, trust_remote_code)
    except CompressError:
        return None
    text = (assets("calib") / "text" / "heldout.txt").read_text(encoding="utf-8")[:4000]
    return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)


def model_dtype(weights: Weights) -> torch.dtype:
    """The dtype that config.json names, else that of the first weight."""
    named = weights.checkpoint.config.get("dtype") or weights.checkpoint.config.get("torch_dtype")
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    return weights.dtype(next(n for n in weights.shapes_cache() if n.endswith(".weight")))


def _place(weights: Weights, dtype: torch.dtype, device: torch.device) -> tuple[torch.device | None, int, int]:
    """Where the whole model fits (None: nowhere), bytes needed, bytes free there."""
    import psutil

    count = 0
    for shape in weights.shapes_cache().values():
        size = 1
        for n in shape:
            size *= n
        count += size
    needed = count * dtype.itemsize + sum(weights.stored_bytes(x) for x in weights.packed)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if needed <= _FULL * free:
            return device, needed, free
    free = int(psutil.virtual_memory().available)
    return (torch.device("cpu") if needed <= _FULL * free else None), needed, free


def _rows(tokens: Tensor | None, model: BlockModel, folder: Path, trust_remote_code: bool) -> Tensor:
    """int64 [rows, seq]: some of `tokens`, else of the bundled text, else (a folder without a tokenizer) random ids."""
    if tokens is None:
        tokens = _bundled(folder, trust_remote_code)
    if tokens is not None and tokens.dim() == 1:
        length = min(TOKENS, len(tokens) // ROWS)
        tokens = tokens[: ROWS * length].reshape(ROWS, length)
    if tokens is not None:
        return tokens[:ROWS, :TOKENS].contiguous()
    config = model.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    length = min(TOKENS, longest) if isinstance(longest, int) and longest > 1 else TOKENS
    generator = torch.Generator().manual_seed(0)
    return torch.randint(int(config.vocab_size), (ROWS, length), generator=generator)
