"""A config from a GGUF file's metadata, for a file that stands alone."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from compress.errors import CompressError
from compress.gguf.header import ARCHITECTURES, ROPE_FREQS, Header, brief


def config_of(header: Header) -> dict[str, Any]:
    """What config.json would say of a file that stands alone. Raises CompressError."""
    architecture = header.architecture
    if "token_embd.weight" not in header.tensors:
        raise CompressError("has no tensor token_embd.weight", str(header.path), "pass the model, not a part of it")
    heads, hidden = header.number("attention.head_count"), header.number("embedding_length")
    head_dim = header.number("attention.key_length", max(1, hidden // heads))
    biased = "blk.0.attn_q.bias" in header.tensors
    classes = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    config: dict[str, Any] = {
        "model_type": ARCHITECTURES[architecture],
        "architectures": [classes[architecture]],
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": header.number("feed_forward_length"),
        "num_hidden_layers": header.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": header.real("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": header.number("context_length"),
        "rope_parameters": _rope(header, head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": "float16",
    }
    if architecture != "qwen2":  # whose q, k and v always have biases
        config["attention_bias"] = biased
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = header.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        config[ours] = value if isinstance(value, int) and 0 <= value < config["vocab_size"] else None
    return config


def _rope(header: Header, head_dim: int) -> dict[str, Any]:
    """rope_parameters of config.json. Raises CompressError for a scaling that transformers has not."""
    theta = header.real("rope.freq_base", 10000.0)
    rotated = header.number("rope.dimension_count", head_dim)
    if rotated != head_dim:
        what = f"rotates {rotated} of the {head_dim} dimensions of a head"
        raise CompressError(what, str(header.path), "this variant of the architecture is not supported")
    if ROPE_FREQS in header.tensors:
        return _llama3(header, theta, head_dim)
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling not in ("linear", "yarn"):
        what = f"rope scaling {brief(scaling)}, readable are linear and yarn"
        raise CompressError(what, str(header.path), "put the model's config.json beside the file")
    found = {"rope_type": scaling, "rope_theta": theta, "factor": header.real("rope.scaling.factor")}
    if scaling == "yarn":
        found["original_max_position_embeddings"] = header.number("rope.scaling.original_context_length")
    return found


def rope_factors(rope: Mapping[str, Any], head_dim: int) -> list[float]:
    """By what Llama 3's scaling divides each of the head_dim / 2 frequencies, as llama.cpp keeps them.

    Between the two wavelengths the frequencies are blended linearly in 1 / wavelength (transformers,
    _compute_llama3_parameters; llama.cpp, convert_hf_to_gguf.py, generate_extra_tensors).
    """
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    found = []
    for turns in _turns(float(rope["rope_theta"]), head_dim):
        blend = min(1.0, max(0.0, (original * turns - low) / (high - low)))
        found.append(1.0 / ((1.0 - blend) / factor + blend))
    return found


def _turns(theta: float, head_dim: int) -> list[float]:
    """1 / wavelength of each frequency, in tokens."""
    return [theta ** (-2 * i / head_dim) / (2 * math.pi) for i in range(head_dim // 2)]


def _llama3(header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling that gives the factors in the file: solved for from two of its blended frequencies.

    The blend is linear, a / wavelength - b, with a = original / (high - low) and b = low / (high - low): one number is
    free, so low_freq_factor is 1, as in every published model. Raises CompressError where nothing of the kind fits.
    """
    info = header.tensors[ROPE_FREQS]
    unsolved = "its rope_freqs.weight fits no rope scaling of transformers"
    remedy = "put the model's config.json beside the file"
    if info.type != 0 or info.shape != (head_dim // 2,):
        raise CompressError(unsolved, str(header.path), remedy)
    with header.path.open("rb") as file:
        file.seek(info.start)
        factors = struct.unpack(f"<{head_dim // 2}f", file.read(info.nbytes))
    plain = {"rope_type": "default", "rope_theta": theta}
    if all(f == 1.0 for f in factors):
        return plain
    factor = max(factors)
    turns = _turns(theta, head_dim)
    blended = [(t, (1 / f - 1 / factor) / (1 - 1 / factor)) for t, f in zip(turns, factors, strict=True) if f > 0]
    inner = [(t, s) for t, s in blended if 1e-4 < s < 1 - 1e-4]
    if len(inner) > 1 and math.isfinite(factor) and inner[0][0] != inner[-1][0]:
        (t0, s0), (t1, s1) = inner[0], inner[-1]
        a = (s1 - s0) / (t1 - t0)
        b = a * t0 - s0
        if a > 0 and b > 0:
            found = {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": float(f"{factor:.6g}"),
                "low_freq_factor": 1.0,
                "high_freq_factor": float(f"{1 + 1 / b:.4g}"),
                "original_max_position_embeddings": round(a / b),
            }
            if all(abs(x - y) <= 1e-3 * y for x, y in zip(rope_factors(found, head_dim), factors, strict=True)):
                return found
    raise CompressError(unsolved, str(header.path), remedy)
