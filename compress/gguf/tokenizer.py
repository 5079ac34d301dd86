"""A tokenizer as GGUF's metadata (keys tokenizer.*): vocabulary, merges, kinds of tokens, special ids, chat template.

llama.cpp splits text with rules of its own, chosen by a name (tokenizer.ggml.pre); the name is recognised here by the
exact rule in tokenizer.json, and a rule that has none is refused: its texts would be cut elsewhere, silently. Sources:
llama.cpp, src/llama-vocab.cpp (names, rules, scores) and convert_hf_to_gguf.py (which keys are written).

Unlike transformers, llama.cpp normalises no text (Qwen's tokenizers apply Unicode's NFC before they cut).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError

#: token types (llama.h, llama_token_type)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
#: the splitting rule of a tokenizer -> tokenizer.ggml.pre
_RULES = {
    _CONTRACTIONS + _WORD + r"\p{N}{1,3}" + _TAIL: "llama-bpe",
    _CONTRACTIONS + _WORD + r"\p{N}" + _TAIL: "qwen2",
    _CASED + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
_REMEDY = "use --format compressed-tensors, or native"


def describe(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The tokenizer's metadata.

    Args:
        folder: the model folder.
        vocab_size: rows of the embeddings; rows without a token get a placeholder.

    Raises:
        CompressError: no tokenizer, or one that llama.cpp would run differently.
    """
    from transformers import AutoTokenizer

    from compress.gguf.files import tokenizer_source
    from compress.skeleton import quiet_transformers

    place, extra = tokenizer_source(folder)
    remedy = "a GGUF file carries its tokenizer: put tokenizer.json and tokenizer_config.json into the folder"
    with quiet_transformers("its tokenizer cannot be loaded", str(folder), remedy):
        loaded = AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True, **extra)
        plain = json.loads(loaded.backend_tokenizer.to_str())
        sample = loaded("a")["input_ids"]
    where = str(folder)
    model = plain["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise CompressError(f"a tokenizer of type {model.get('type')} is not written to GGUF", where, _REMEDY)
    names: dict[int, str] = {number: token for token, number in model["vocab"].items()}
    added = {int(a["id"]): a for a in plain["added_tokens"]}
    names |= {number: a["content"] for number, a in added.items()}
    if max(names) >= vocab_size:
        what = f"its tokenizer has the id {max(names)}, the embeddings hold {vocab_size} rows"
        raise CompressError(what, where, "pass the tokenizer that belongs to this model")
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    pieces = bool(model.get("byte_fallback"))
    out: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if pieces else "gpt2",
        "tokenizer.ggml.pre": "default" if pieces else _rule(plain, where),
        "tokenizer.ggml.tokens": [names.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": [_kind(i, names, added, loaded.unk_token, pieces) for i in range(vocab_size)],
        "tokenizer.ggml.merges": [" ".join(m) for m in merges],
    }
    if pieces:
        out["tokenizer.ggml.scores"] = _scores(out["tokenizer.ggml.tokens"], merges)
        out["tokenizer.ggml.add_space_prefix"] = _space_prefix(plain, where)
    for key in ("bos", "eos", "unk", "pad"):
        number = getattr(loaded, f"{key}_token_id")
        longer = {"unk": "unknown", "pad": "padding"}.get(key, key)
        if isinstance(number, int) and 0 <= number < vocab_size:
            out[f"tokenizer.ggml.{longer}_token_id"] = number
    out["tokenizer.ggml.add_bos_token"] = loaded.bos_token_id is not None and sample[0] == loaded.bos_token_id
    out["tokenizer.ggml.add_eos_token"] = loaded.eos_token_id is not None and sample[-1] == loaded.eos_token_id
    template = loaded.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if isinstance(template, str) and template:
        out["tokenizer.chat_template"] = template
    return out


def _kind(number: int, names: Mapping[int, str], added: Mapping[int, Any], unknown: str | None, pieces: bool) -> int:
    """The type of one token."""
    token = names.get(number)
    if token is None:
        return UNUSED
    if pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return BYTE
    if pieces and token == unknown:
        return UNKNOWN
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    return NORMAL


def _rule(plain: Mapping[str, Any], where: str) -> str:
    """tokenizer.ggml.pre of a byte-level tokenizer. Raises CompressError for a rule without a name."""
    normalizer = plain.get("normalizer") or {}
    if normalizer.get("type") not in (None, "NFC") and normalizer != {"type": "Sequence", "normalizers": []}:
        what = f"a byte-level tokenizer with the normalizer {normalizer['type']} is not written to GGUF"
        raise CompressError(what, where, _REMEDY)
    steps = _flat(plain.get("pre_tokenizer"), "pretokenizers")
    kinds = [s["type"] for s in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        regex = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and regex and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not regex and not steps[0].get("invert"):
            rule = steps[0].get("pattern", {}).get("Regex")
            if rule in _RULES and str(steps[0].get("behavior")).lower() == "isolated":
                return _RULES[rule]
    what = f"its tokenizer cuts text by a rule that llama.cpp has no name for ({' + '.join(kinds) or 'none'})"
    raise CompressError(what, where, _REMEDY)


def _flat(step: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a Sequence, of sequences within it, or the one step."""
    if not step:
        return []
    if step.get("type") != "Sequence":
        return [step]
    return [inner for part in step[key] for inner in _flat(part, key)]


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """What llama.cpp joins pieces by, best first: less the rank of the first merge that makes a token."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    return [-float(rank.get(token, 0)) for token in tokens]


def _space_prefix(plain: Mapping[str, Any], where: str) -> bool:
    """Whether a text gets a space in front. Raises CompressError for other normalisation than of spaces."""
    steps = [*_flat(plain.get("normalizer"), "normalizers"), *_flat(plain.get("pre_tokenizer"), "pretokenizers")]
    prefix = False
    for step in steps:
        if step["type"] == "Prepend" and step.get("prepend") == "\u2581":
            prefix = True
        elif step["type"] == "Metaspace" and step.get("replacement") == "\u2581":
            prefix = step.get("prepend_scheme", "always") != "never"
        elif step["type"] != "Replace" or step.get("content") != "\u2581":
            what = f"a tokenizer with bytes to fall back on and the step {step['type']} is not written to GGUF"
            raise CompressError(what, where, _REMEDY)
    return prefix
