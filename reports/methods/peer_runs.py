"""What peers.py runs: ours, llm-compressor, bitsandbytes. Each function makes one run and returns its figures."""

from __future__ import annotations

import argparse
import gc
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from compress.api import evaluation, find_device, find_model, load_tokenizer
from compress.calibration import Rows, calibration_rows
from compress.checkpoint import Checkpoint
from compress.evaluate.perplexity import cut_windows, evaluate
from compress.weights import Weights

Modifiers = list[tuple[str, dict[str, Any]]]


class Bench:
    """The inputs that all runs share: model, rows, text. A run leaves a checkpoint in `out`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.source, self.device = find_model(args.model), find_device(None)
        tokenizer = load_tokenizer(self.source)
        self.tokens = evaluation(tokenizer, args.eval).tokens[: args.tokens]
        self.rows = calibration_rows(args.calib, tokenizer, samples=args.samples, seq_len=args.seq_len)
        self.out = args.out / "checkpoint"
        self.warm: set[str] = set()

    def make(self, work: Callable[[Rows], dict[str, Any]], kind: str) -> dict[str, Any]:
        """Run and score. The first of a kind is run on two short rows before, so that no row times the start-up."""
        rows = self.rows
        if kind not in self.warm:
            self.warm.add(kind)
            self.clear()
            work(replace(rows, tokens=rows.tokens[:2, :64].contiguous()))
        self.clear()
        begun = self.clock()
        found = work(rows)
        found["seconds"] = self.clock() - begun
        return {**self.score(), **found}

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        gc.collect()
        torch.cuda.empty_cache()

    def score(self) -> dict[str, Any]:
        """The checkpoint in `out` by our evaluator, and what is in it: bits, share of zeros."""
        made, original = Weights(Checkpoint.open(self.out)), Weights(Checkpoint.open(self.source))
        score, dense = evaluate(made, self.tokens, self.device, torch.float32, original, self.args.window)
        assert dense is not None
        zeros = total = 0
        for name in linear_names(original.shapes()):
            weight = made.read(name)
            zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
        stored = made.checkpoint.tensors
        sizes = {n: made.checkpoint.read(n).nbytes for n in stored if n.rpartition(".")[0] in made.packed}
        return {
            **asdict(score),
            "dense": dense.perplexity,
            "zeros": zeros / total,
            "bits": 8 * sum(sizes.values()) / total if made.packed else 16.0,
        }


def linear_names(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The matrices inside the decoder blocks, which are what every method here compresses."""
    return [n for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2 and ".layers." in n]


def ours(bench: Bench, step: str) -> dict[str, Any]:
    """Our pass by a recipe's step, with its defaults otherwise."""
    from compress.clients import pick
    from compress.job import Job
    from compress.pipeline import compress_checkpoint
    from compress.recipe import Recipe, parse
    from compress.report import stored_bits

    recipe = Recipe.of(parse(step))

    def work(rows: Rows) -> dict[str, Any]:
        form = pick("auto", [p.storage for p in recipe.passes])
        given = rows if recipe.needs else None
        job = Job(
            bench.source, bench.out, recipe, form, given, device=bench.device, origin="peers", fresh=True, client=False
        )
        return {"bits": stored_bits(compress_checkpoint(job)), "format": form}

    return bench.make(work, "ours " + step.split()[0])


def llm_compressor(bench: Bench, modifiers: Modifiers, calibrated: bool) -> dict[str, Any]:
    """llm-compressor's oneshot with the modifiers' defaults, written as its documentation shows."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from loguru import logger
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.remove()
    classes = {c.__name__: c for c in (GPTQModifier, SparseGPTModifier, QuantizationModifier, SmoothQuantModifier)}

    def work(rows: Rows) -> dict[str, Any]:
        tokens = rows.tokens
        model = AutoModelForCausalLM.from_pretrained(bench.source, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(bench.source)
        data = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
        options: dict[str, Any] = {}
        if calibrated:
            options = {
                "dataset": Dataset.from_dict(data),
                "max_seq_length": tokens.shape[1],
                "num_calibration_samples": len(tokens),
                "shuffle_calibration_samples": False,
                "batch_size": bench.args.peer_batch,
            }
        recipe = [classes[name](**settings) for name, settings in modifiers]
        oneshot(model=model, processor=tokenizer, recipe=recipe, **options)
        packs = any(name != "SparseGPTModifier" for name, _ in modifiers)
        model.save_pretrained(bench.out, save_compressed=packs)
        tokenizer.save_pretrained(bench.out)
        return {"format": "compressed-tensors" if packs else "dense"}

    return bench.make(work, "llm_compressor " + " ".join(name for name, _ in modifiers))


def bnb_4bit(bench: Bench, kind: str, double: bool) -> dict[str, Any]:
    """Every linear layer through bitsandbytes' 4-bit kernels and back, written as a dense folder."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from safetensors.torch import save_file

    def work(rows: Rows) -> dict[str, Any]:
        bench.out.mkdir()
        for file in bench.source.glob("*.json"):
            if not file.name.endswith(".index.json"):
                shutil.copy(file, bench.out)
        original = Checkpoint.open(bench.source)
        tensors = {name: original.read(name) for name in original.tensors}
        stored = total = 0
        for name in linear_names({n: tuple(t.shape) for n, t in tensors.items()}):
            weight = tensors[name].to(bench.device)
            codes, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
            stored += codes.nbytes + state.absmax.nbytes + (4 + state.state2.absmax.nbytes if double else 0)
            total += weight.numel()
            tensors[name] = dequantize_4bit(codes, state).to(weight.dtype).cpu()
        save_file(tensors, bench.out / "model.safetensors", metadata={"format": "pt"})
        return {"bits": 8 * stored / total, "format": "dense, from bitsandbytes' codes"}

    return bench.make(work, "bnb_4bit")


def own_forward(bench: Bench, dtype: str, eight: bool) -> dict[str, Any]:
    """A model run by transformers in `dtype`, with bitsandbytes' LLM.int8() or dense, against it in float32.

    The figures are defined as in compress.evaluate.perplexity, over the same windows.
    """
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a cast in every product
    load, where = AutoModelForCausalLM.from_pretrained, {"": bench.device}
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0) if eight else None
    bench.clear()
    begun = bench.clock()
    model = load(bench.source, dtype=getattr(torch, dtype), quantization_config=config, device_map=where).eval()
    seconds = bench.clock() - begun
    reference = load(bench.source, dtype=torch.float32, device_map=where).eval()
    longest = min(2048, model.config.get_text_config().max_position_embeddings)
    windows = cut_windows(bench.tokens, bench.args.window or longest).to(bench.device)
    sums = dict.fromkeys(("nll", "base", "kl", "same"), 0.0)
    with torch.inference_mode():
        for row in windows:
            q, p = (F.log_softmax(m(input_ids=row[None]).logits[0].float(), -1) for m in (model, reference))
            for key, found in (("nll", q), ("base", p)):
                sums[key] -= float(found[:-1].gather(1, row[1:, None]).double().sum())
            sums["kl"] += float((p.exp() * (p - q)).sum(-1).double().sum())
            sums["same"] += float((p.argmax(-1) == q.argmax(-1)).sum())
    packed = [m for m in model.modules() if type(m).__name__ == "Linear8bitLt"]
    assert bool(packed) == eight, "transformers replaced no layer"
    rows, weights = sum(m.out_features for m in packed), sum(m.weight.numel() for m in packed)
    predictions = windows.numel() - len(windows)
    return {
        "perplexity": float(torch.tensor(sums["nll"] / predictions).exp()),
        "dense": float(torch.tensor(sums["base"] / predictions).exp()),
        "kl": sums["kl"] / windows.numel(),
        "top1": sums["same"] / windows.numel(),
        "windows": len(windows),
        "window": windows.shape[1],
        "seconds": seconds,
        "bits": 8 * (weights + 4 * rows) / weights if eight else 16.0,
        "format": "none: loaded and quantised" if eight else "none: dense",
    }
