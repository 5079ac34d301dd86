"""compress.run and compress.score: the Python side of the command line."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.assets import folder
from compress.calibration import EvalText, Rows, calibration_rows
from compress.checkpoint import Checkpoint
from compress.clients import pick
from compress.cuda.support import preload
from compress.errors import CompressError
from compress.evaluate.perplexity import Score, cut_windows, evaluate
from compress.evaluate.states import Cache
from compress.evaluate.suite import Asked, Subject, check_comparable, common_window, evaluate_all
from compress.evaluate.texts import Text, read_text
from compress.formats import FORMATS
from compress.gguf import files as gguf_files
from compress.hub import check_push
from compress.job import Clock, Job, Progress, Result, Status
from compress.journal import check_output
from compress.options import Options
from compress.pipeline import compress_checkpoint, default_dtype, open_dense
from compress.plan import check_room
from compress.recipe import Recipe
from compress.skeleton import load_config, quiet_transformers
from compress.types import Pass, Transform
from compress.weights import Weights

BUNDLED = "bundled"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "README.md", "tokenizer*"]
_HUB_FILES += ["LICEN[CS]E*", "licen[cs]e*", "NOTICE*", "COPYING*", "*POLICY*"]  # what a licence wants to go along
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(model: str | Path, method: Pass | Transform | Recipe, out: str | Path | None = None, **options: Any) -> Result:
    """Compress a model: `compress.run("MODEL", GPTQ(bits=4), out="OUT")`.

    Args:
        model: a folder, a hub id, or "bundled" for the small model that comes with the package.
        method: a pass or a transform with its settings, or a recipe (`compress.read_recipe`).
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
    return compress_checkpoint(make_job(str(model), method, chosen), progress or (lambda status: None))


def make_job(model: str, method: Pass | Transform | Recipe, options: Options, dry: bool = False) -> Job:
    """Resolve what the options name: folder, device, calibration rows, evaluation text.

    Args:
        options: those at their defaults give way to the recipe's own.
        dry: leave calibration and evaluation text out (a plan needs neither).
    """
    recipe = Recipe.of(method)
    options = under(options, recipe.options)
    if options.format not in ("auto", *FORMATS):
        raise CompressError(f"no format {options.format!r}", "--format", f"there are auto, {', '.join(FORMATS)}")
    if not 0 <= options.seed < 2**63:
        raise CompressError(f"{options.seed} is out of range", "--seed", "use 0 to 2^63 - 1")
    source = find_model(model, options.allow_pickle)
    device, dtype = find_device(options.device), find_dtype(options.dtype)
    recipe = settled(recipe, device, options)
    if not dry:
        wake(device)
    name = BUNDLED if model == BUNDLED else os.path.basename(os.path.abspath(os.path.expanduser(model)))
    out = options.out or Path(f"{name}-{recipe.label}")
    # what can be refused at once is, before texts are fetched and tokenised
    open_dense(source, options.allow_pickle)
    longest = context_length(source, options.trust_remote_code)
    if not dry:
        check_output(out, options.overwrite, source)
        check_room(out, 0)
    push_to = None if options.push_to is None else check_push(options.push_to, options.overwrite, dry)
    rows, text = (None, None) if dry else _texts(source, recipe, options, device, longest)
    return Job(
        source=source,
        out=out,
        recipe=recipe,
        format=pick(options.format, [p.storage for p in recipe.passes], options.target),
        rows=rows,
        text=text,
        device=device,
        dtype=dtype,
        true_sequential=options.true_sequential,
        include=options.include,
        exclude=options.exclude,
        blocks=options.blocks,
        target=options.target,
        lm_head=options.lm_head,
        low_memory=options.low_memory,
        seed=options.seed,
        fallback=options.format == "auto" and options.target is None,
        verify=not options.no_verify,
        client=not options.no_client,
        origin=name if Path(model).exists() else model,
        overwrite=options.overwrite,
        fresh=options.fresh,
        allow_pickle=options.allow_pickle,
        trust_remote_code=options.trust_remote_code,
        push_to=push_to,
        push_public=options.push_public,
    )


def settled(recipe: Recipe, device: torch.device, options: Options) -> Recipe:
    """A recipe as it is run: with the refiner that was asked for, quality `auto` made out by what it is to run on."""
    options = under(options, recipe.options)
    if options.refine is not None:
        recipe = recipe.refined(options.refine, "--refine")
    return recipe.settled(room=device.type == "cuda" and not options.low_memory)


def under(options: Options, given: Mapping[str, Any]) -> Options:
    """`options`, with what a recipe gives in place of those that are at their defaults."""
    plain = Options()
    return replace(options, **{k: v for k, v in given.items() if getattr(options, k) == getattr(plain, k)})


def _texts(
    source: Path, recipe: Recipe, options: Options, device: torch.device, longest: int | None
) -> tuple[Rows | None, EvalText | None]:
    """Calibration rows and evaluation text, None for what the recipe and the options do without."""
    calibrated = bool(recipe.needs)
    if not calibrated and options.no_eval:
        return None, None
    tokenizer = load_tokenizer(source, options.trust_remote_code)
    rows = calibration(source, tokenizer, options, device, longest) if calibrated else None
    if options.no_eval:
        return rows, None
    text = evaluation(tokenizer, options.eval, min(2048, longest or 2048))
    cut_windows(text.tokens, min(2048, longest or 2048))  # a text that is too short says so now, not after the work
    return rows, text


def find_model(model: str, allow_pickle: bool = False) -> Path:
    """The folder of a model (or a GGUF file alone): itself, the bundled one, or a snapshot from the hub.

    Raises:
        CompressError: no such folder; the hub has no such model or cannot be reached.
    """
    if model == BUNDLED:
        return folder("calib") / "tiny"
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return gguf_files.model_place(path)
    if path.is_file():
        raise CompressError("is a file", model, "pass the model's folder, or a .gguf file")
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


def wake(device: torch.device) -> None:
    """Start a GPU's context and libraries in the background: seconds, while texts are read and tokenised.

    A process that ends meanwhile waits: torn down under a library that starts, it would be aborted.
    """
    if device.type == "cuda":
        threading.Thread(target=_started, args=(device,), name="wake").start()


def _started(device: torch.device) -> None:
    eye = torch.eye(8, device=device)
    torch.linalg.cholesky(eye @ eye)
    preload()


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

    remedy = "the folder needs tokenizer.json and tokenizer_config.json (--trust-remote-code if its code is its own)"
    place, extra = gguf_files.tokenizer_source(source)
    with quiet_transformers("its tokenizer cannot be loaded", str(source), remedy):
        made = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, local_files_only=True, **extra)
        made("Some settings fail only when they are used: \u6f22\u5b57 \u00e9 \N{SNOWMAN}")
    return made


def context_length(source: Path, trust_remote_code: bool = False) -> int | None:
    """max_position_embeddings of a model folder, by whatever name its family uses; None when it names none."""
    config = load_config(source, trust_remote_code)
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def calibration(source: Path, tokenizer: Any, options: Options, device: torch.device, longest: int | None) -> Rows:
    """The calibration rows that the options ask for, none longer than the model's context."""
    seq_len = min(2048, longest or 2048) if options.seq_len is None else options.seq_len
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

        file = gguf_files.find(source)
        place, extra = (source, {}) if file is None else (file.parent, {"gguf_file": file.name})
        model = AutoModelForCausalLM.from_pretrained(place, dtype="auto", trust_remote_code=trust_remote_code, **extra)
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


def evaluation(tokenizer: Any, source: str, window: int) -> Text:
    """The evaluation text that the options ask for. `window`: tokens that are scored at once."""
    return read_text(source, tokenizer, window)


def score(
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
    place = find_device(device)
    subject = _subject(str(model), dtype, place, trust_remote_code)
    base = None if against is None else _subject(str(against), dtype, place, trust_remote_code)
    length, _ = common_window([subject, *([base] if base else [])], window)
    if base is not None:
        check_comparable(subject, base)
    used = evaluation(subject.tokenizer, text, length)
    report = progress or (lambda status: None)
    found, original = evaluate(
        subject.weights,
        used.tokens,
        place,
        (base or subject).dtype,
        None if base is None else base.weights,
        length,
        trust_remote_code,
        lambda done, total: report(Status("evaluate", done, total)),
        sizes=used.sizes,
    )
    return found, original, used


def evaluate_models(
    models: Sequence[str | Path],
    texts: Sequence[str] = ("wikitext2",),
    *,
    against: str | Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    layers: bool = False,
    tasks: Sequence[str] = (),
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    low_memory: bool = False,
    cache_gb: float = 0.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Several models against one original, all of whose states are made once; what `compress eval` prints as JSON.

    Args:
        texts: protocols' names, files, folders or hub data sets.
        window, stride: tokens a window, and from one to the next; None for 2048 (or the context), side by side.
        windows: only the first so many of each text.
        layers: tell each layer's relative output error on the first text.
        tasks: names of lm-eval's tasks, or YAML files for it.
        dtype: "auto" for the original's own on a GPU and float32 on a CPU.
        cache_gb: keep so many GB of originals' states for later runs; 0 keeps none.

    Returns:
        schema 1 of compress/report/evaluation.py.

    Raises:
        CompressError: anything a user can mend.
    """
    from compress.report import evaluation as reporting
    from compress.smollm2 import cache_folder

    place = find_device(device)
    find_dtype(dtype)
    if cache_gb < 0:
        raise CompressError(f"{cache_gb:g} GB are too few", "--cache", "use 0 for none, or more")
    base = None if against is None else _subject(str(against), dtype, place, trust_remote_code)
    subjects = [_subject(str(model), dtype, place, trust_remote_code, base) for model in models]
    asked = Asked(
        tuple(texts), window, stride, windows, layers, tuple(tasks), place, trust_remote_code, low_memory,
        Cache(cache_folder() / "states", int(cache_gb * 1e9)) if cache_gb else None,
    )  # fmt: skip
    report, clock = progress or (lambda status: None), Clock(device=place)
    found = evaluate_all(subjects, base, asked, lambda done, total: report(Status("evaluate", done, total)), clock)
    return reporting.whole(found, clock.seconds, None if place.type == "cpu" else place.index or 0)


def _subject(
    model: str, dtype: str, device: torch.device, trust_remote_code: bool, base: Subject | None = None
) -> Subject:
    """A model to evaluate, in the dtype of the original that it is compared with. Raises CompressError."""
    precision = find_dtype(dtype)
    source = find_model(model)
    weights = Weights(Checkpoint.open(source))
    some = next((n for n in weights.shapes_cache() if n.endswith(".weight")), "")
    if not some:
        raise CompressError("0 tensors are named *.weight", str(source), "pass a causal language model")
    config = load_config(source, trust_remote_code).get_text_config()
    return Subject(
        model,
        source,
        weights,
        load_tokenizer(source, trust_remote_code),
        context_length(source, trust_remote_code),
        int(config.vocab_size),
        precision or (default_dtype(weights.dtype(some), device) if base is None else base.dtype),
    )
