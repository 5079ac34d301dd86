"""What GGUF calls the tensors of a Hugging Face checkpoint, and which of them it keeps in another order."""

from __future__ import annotations

import re

from compress.formats.gguf import TYPES

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TO_OUTSIDE = {v: k for k, v in _OUTSIDE.items()}
_TO_INSIDE = {v: k for k, v in _INSIDE.items()}


def to_hugging_face(name: str) -> str | None:
    """The name of a tensor of GGUF in a Hugging Face checkpoint, None if it has none."""
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    inside = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)", stem)
    if inside is not None and inside[2] in _INSIDE:
        return f"model.layers.{inside[1]}.{_INSIDE[inside[2]]}.{leaf}"
    return f"{_OUTSIDE[stem]}.{leaf}" if stem in _OUTSIDE else None


def to_gguf(name: str) -> tuple[str, str] | None:
    """GGUF's name of a tensor and the suffix that it has here ("weight", "bias", "q4_0"); None if it has no place."""
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias", *TYPES):
        return None
    ending = "bias" if leaf == "bias" else "weight"
    inside = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)", stem)
    if inside is not None and inside[2] in _TO_INSIDE:
        return f"blk.{inside[1]}.{_TO_INSIDE[inside[2]]}.{ending}", leaf
    return (f"{_TO_OUTSIDE[stem]}.{ending}", leaf) if stem in _TO_OUTSIDE else None


def rope_heads(architecture: str, name: str, heads: int, kv_heads: int) -> int:
    """For how many heads the rows of a tensor (GGUF's name) are interleaved; 0 where they are not."""
    if architecture != "llama":
        return 0  # qwen2 and qwen3 rotate halves, as transformers does
    part = name.split(".")[-2]
    return {"attn_q": heads, "attn_k": kv_heads}.get(part, 0)
