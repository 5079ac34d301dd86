"""compress.run and compress.evaluate: the Python side of the command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.assets import folder
from compress.calibration import EvalText, Rows, calibration_rows, evaluation_tokens
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.evaluate.perplexity import Score
from compress.evaluate.perplexity import evaluate as score_checkpoint
from compress.formats import FORMATS
from compress.options import Options
from compress.pipeline import Job, Progress, Result, Status, compress_checkpoint, default_dtype
from compress.types import Needs, Pass

BUNDLED = "bundled"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "README.md", "tokenizer*"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(model: str | Path, method: Pass, out: str | Path | None = None, **options: Any) -> Result:
    """Compress a model: `compress.run("MODEL", GPTQ(bits=4), out="OUT")`.

    Args:
        model: a folder, a hub id, or "bundled" for the small model that comes with the package.
        method: a pass with its settings.
        out: the output folder.
        options: fields of `Options`; `progress` takes a callable that receives `Status`.

    Returns:
        The result, with records, scores and seconds; the output folder is complete.

    Raises:
        CompressError: anything a user can mend.
    """
    progress = options.pop("progress", None)
    chosen = Options(**options)
    if out is not None:
        chosen = replace(chosen, out=Path(out))
    return compress_checkpoint(make_job(str(model), method, chosen, progress), progress or (lambda status: None))


def make_job(model: str, method: Pass, options: Options, progress: Progress | None = None, dry: bool = False) -> Job:
    """Resolve what the options name: folder, device, calibration rows, evaluation text.

    Args:
        dry: leave calibration and evaluation text out (a plan needs neither).
    """
    if options.format not in FORMATS:
        raise CompressError(f"no format {options.format!r}", "--format", f"there are {', '.join(FORMATS)}")
    source = find_model(model, options.allow_pickle)
    device = find_device(options.device)
    rows = text = None
    if not dry:
        tokenizer = None
        if Needs.HESSIAN in method.needs or not options.no_eval:
            tokenizer = load_tokenizer(source, options.trust_remote_code)
        if Needs.HESSIAN in method.needs:
            rows = calibration(source, tokenizer, options, device)
        if not options.no_eval:
            text = evaluation(tokenizer, options.eval)
    bits = method.storage.bits
    name = "bundled" if model == BUNDLED else Path(model).name
    return Job(
        source=source,
        out=options.out or Path(f"{name}-{method.name}-{bits}bit"),
        method=method,
        format=options.format,
        rows=rows,
        text=text,
        device=device,
        dtype=find_dtype(options.dtype),
        true_sequential=options.true_sequential,
        include=options.include,
        exclude=options.exclude,
        lm_head=options.lm_head,
        seed=options.seed,
        origin=name if Path(model).exists() else model,
        overwrite=options.overwrite,
        fresh=options.fresh,
        allow_pickle=options.allow_pickle,
        trust_remote_code=options.trust_remote_code,
    )


def find_model(model: str, allow_pickle: bool = False) -> Path:
    """The folder of a model: itself, the bundled one, or a snapshot from the hub.

    Raises:
        CompressError: no such folder; the hub has no such model or cannot be reached.
    """
    if model == BUNDLED:
        return folder("calib") / "tiny"
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CompressError("is a file", model, "pass the model's folder")
    if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model) or model.count("/") > 1:
        raise CompressError("no such folder", model, "pass a model folder or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = [*_HUB_FILES, *(["*.bin"] if allow_pickle else [])]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CompressError(
            f"no such folder, and the hub did not give it ({type(error).__name__}: {reason})",
            model,
            "pass a local folder; without hub access try `compress demo`",
        ) from None


def find_device(name: str | None) -> torch.device:
    """cuda if there is one, unless named. Raises CompressError for a device that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CompressError(f"no device {name!r}", "--device", "use cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise CompressError(f"device {name!r} is not supported", "--device", "use cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CompressError(f"{torch.cuda.device_count()} CUDA devices here", f"--device {name}", "use --device cpu")
    return device


def find_dtype(name: str) -> torch.dtype | None:
    """None for auto. Raises CompressError."""
    if name == "auto":
        return None
    if name not in _DTYPES:
        raise CompressError(f"no dtype {name!r}", "--dtype", f"use auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_tokenizer(source: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder. Raises CompressError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CompressError(
            f"its tokenizer cannot be loaded ({reason})", str(source), "the folder needs tokenizer.json and its config"
        ) from None


def context_length(source: Path) -> int | None:
    """max_position_embeddings of a model folder, by whatever name its family uses; None when it names none."""
    from compress.blocks import load_config

    found = getattr(load_config(source).get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def calibration(source: Path, tokenizer: Any, options: Options, device: torch.device) -> Rows:
    """The calibration rows that the options ask for."""
    longest = None if options.trust_remote_code else context_length(source)
    seq_len = options.seq_len or min(2048, longest or 2048)
    if longest is not None and seq_len > longest:
        raise CompressError(
            f"{seq_len} tokens a row, the model's context is {longest}", "--seq-len", f"use {longest} or less"
        )
    return calibration_rows(
        options.calib,
        tokenizer,
        samples=options.samples,
        seq_len=seq_len,
        seed=options.seed,
        column=options.calib_column,
        chat_template=options.chat_template,
        generate=self_text(source, tokenizer, device, options.trust_remote_code),
    )


def self_text(
    source: Path, tokenizer: Any, device: torch.device, trust_remote_code: bool
) -> Callable[[int, int, int], Tensor]:
    """A generator of the model's own text: sampled at temperature 1 from one start token, EOS not ending a row."""

    @torch.no_grad()
    def generate(samples: int, seq_len: int, seed: int) -> Tensor:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=trust_remote_code)
        model = model.to(device).eval()
        torch.manual_seed(seed)
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        parts = []
        for i in range(0, samples, 16):
            begin = torch.full((min(16, samples - i), 1), 0 if start is None else start, device=device)
            made = model.generate(
                begin,
                attention_mask=torch.ones_like(begin),
                max_new_tokens=seq_len,
                min_new_tokens=seq_len,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=start or 0,
            )
            parts.append(made[:, 1 : seq_len + 1].cpu())
        return torch.cat(parts).long()

    return generate


def evaluation(tokenizer: Any, source: str) -> EvalText:
    """The evaluation text that the options ask for."""
    return evaluation_tokens(source, tokenizer)


def evaluate(
    model: str | Path,
    text: str = "wikitext2",
    *,
    against: str | Path | None = None,
    window: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[Score, Score | None, EvalText]:
    """Perplexity of any checkpoint, dense or packed; `against` also gives the distance from an original.

    Returns:
        the model's score, the original's (None without one), the text.

    Raises:
        CompressError: anything a user can mend.
    """
    from compress.weights import Weights

    source = find_model(str(model))
    weights = Weights(Checkpoint.open(source))
    tokens = evaluation(load_tokenizer(source, trust_remote_code), text)
    place = find_device(device)
    original = None if against is None else Weights(Checkpoint.open(find_model(str(against))))
    some = next(n for n in weights.shapes_cache() if n.endswith(".weight"))
    report = progress or (lambda status: None)
    score, base = score_checkpoint(
        weights,
        tokens.tokens,
        place,
        find_dtype(dtype) or default_dtype(weights.dtype(some), place),
        original,
        window,
        trust_remote_code,
        lambda done, total: report(Status("evaluate", done, total)),
    )
    return score, base, tokens
