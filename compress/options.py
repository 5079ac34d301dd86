"""The settings of a run that are not a pass's own. The command line and the Python API are both derived from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _option(default: Any, text: str, *flags: str) -> Any:
    return field(default=default, metadata={"help": text, "flags": flags})


@dataclass(frozen=True)
class Options:
    """Where data comes from, where the result goes, what is allowed."""

    out: Path | None = _option(None, "output folder; default: MODEL-METHOD-BITSbit here", "-o", "--out")
    format: str = _option(
        "auto",
        "compressed-tensors, gptq (v1), gptq_v2, bitsandbytes, gguf, native (our own, for what no client holds) or "
        "dense (ordinary weights); default: what --target reads, or the first of these that holds the result",
    )
    target: str | None = _option(
        None,
        "the client that must load the result: transformers, vllm, sglang, gptqmodel or llama.cpp; refused at once if "
        "it cannot",
    )
    calib: str = _option(
        "pile",
        "calibration data: pile, c4, wikitext2, ptb, bundled, self (the model's own text), a .txt/.jsonl/.parquet "
        "file or folder, or a hub data set id (with --calib-column)",
    )
    calib_column: str | None = _option(None, "text column of a data set")
    chat_template: bool = _option(False, "rows are chats: format them with the tokenizer's chat template")
    samples: int = _option(128, "calibration rows")
    seq_len: int | None = _option(None, "tokens a row; default: 2048, or the model's context if shorter")
    seed: int = _option(0, "seed of every random choice")
    eval: str = _option("wikitext2", "evaluation text: as --calib")
    no_eval: bool = _option(False, "do not evaluate")
    refine: str | None = _option(
        None,
        "settings of what --quality best does to whole blocks, such as 'steps=200 norms=true' or 'window=2'; also asks "
        "for best where --quality is auto",
    )
    include: tuple[str, ...] = _option((), "only layers whose name matches this pattern (repeatable)")
    exclude: tuple[str, ...] = _option((), "leave layers whose name matches this pattern (repeatable)")
    blocks: str = _option("", "only these decoder blocks: 0-3,-1")
    lm_head: bool = _option(False, "compress the output head too (not where it is tied to the embeddings)")
    true_sequential: bool = _option(
        False, "collect each layer's statistics after the layers before it in the block were compressed"
    )
    device: str | None = _option(None, "cpu, cuda, cuda:1; default: cuda if there is one")
    low_memory: bool = _option(
        False,
        "keep nothing on the GPU that can be elsewhere: hidden states in host memory, no block ahead of its turn, "
        "embeddings and head only while they are needed, a quarter of the calibration rows at once; slower",
    )
    dtype: str = _option("auto", "auto, float32, bfloat16 or float16: precision in which blocks run")
    no_verify: bool = _option(False, "do not read the result back, and do not load it through its client")
    no_client: bool = _option(False, "do not load the result whole through the client that reads its format")
    overwrite: bool = _option(False, "replace an existing output once the new one is complete")
    fresh: bool = _option(False, "start over instead of going on with a stopped run")
    allow_pickle: bool = _option(False, "read pytorch_model.bin through torch's weights-only unpickler")
    trust_remote_code: bool = _option(False, "run model code that comes with the checkpoint")
    push_to: str | None = _option(
        None,
        "upload the finished folder to this hub repository (NAME or ORG/NAME; a new one is private); the token is that "
        "of HF_TOKEN or `hf auth login`",
    )
    push_public: bool = _option(False, "make a new --push-to repository public")
