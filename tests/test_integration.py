"""Native checkpoints in plain transformers, as a user would load them: in fresh interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.recipe import parse

COMMON: dict[str, Any] = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES = ("llama", "gpt2", "qwen3_moe", "mixtral", "falcon")

LOAD = """
import json, sys, warnings
{imports}
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
from compress.linear import PackedLinear
tokens = torch.arange(24)[None] % 300
for folder, dtype, where in json.loads(sys.argv[1]):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=where, output_loading_info=True
        )
    with torch.no_grad():
        logits = model(tokens).logits
    made = model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = compress.load(folder, device="cpu", dtype=dtype)
    with torch.no_grad():
        want = ours(tokens).logits
    print(json.dumps({{
        "info": {{k: sorted(map(str, v)) for k, v in info.items()}},
        "dtypes": sorted({{str(p.dtype) for p in model.parameters()}}),
        "packed": sum(isinstance(m, PackedLinear) for m in model.modules()),
        "ours": sum(isinstance(m, PackedLinear) for m in ours.modules()),
        "bytes": [model.get_memory_footprint(), ours.get_memory_footprint()],
        "same": bool(torch.equal(logits, want)), "made": list(made.shape),
        "said": [str(w.message) for w in said if "compress" in str(w.filename) or "packed" in str(w.message)],
    }}))
"""


def config_of(family: str) -> Any:
    from transformers import FalconConfig, GPT2Config, LlamaConfig, MixtralConfig, Qwen3MoeConfig

    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    wide = {"hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 128}
    return {
        "llama": lambda: LlamaConfig(tie_word_embeddings=True, attention_bias=True, **wide, **heads, **COMMON),
        "gpt2": lambda: GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=128, **COMMON),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            moe_intermediate_size=32, head_dim=16, num_experts=4, num_experts_per_tok=2, **wide, **heads, **COMMON
        ),
        "mixtral": lambda: MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **wide, **heads, **COMMON),
        "falcon": lambda: FalconConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, bias=False, alibi=False, **COMMON
        ),
    }[family]()


@pytest.fixture(scope="module")
def native(
    make_model: Callable[..., Path], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """native(family, line, **options): such a model in the native format."""
    base = tmp_path_factory.mktemp("native")

    def make(family: str, line: str, **options: Any) -> Path:
        source, out = base / family, base / f"{family}-{line}-{options}".replace(" ", "-").replace("*", "")
        if not source.exists():
            make_model(config_of(family), source, tokenizer, torch.bfloat16)
        if not out.exists():
            compress.run(source, parse(line), out, format="native", no_eval=True, no_verify=True, **options)
        return out

    return make


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=given, capture_output=True, text=True, check=False
    )


def loaded(*jobs: tuple[Path, str, Any], imports: str = "import compress") -> list[dict[str, Any]]:
    """What the script found, for each (folder, dtype, device_map)."""
    given = json.dumps([(str(folder), dtype, where) for folder, dtype, where in jobs])
    done = python(LOAD.format(imports=imports), given)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(jobs)
    for one in found:
        assert not any(one["info"].values())
        assert one["made"] == [1, 28]
        assert one["same"]
        assert one["packed"] == one["ours"]
        assert one["bytes"][0] == one["bytes"][1]
    return found


#: which comes first, and whether transformers' tables are there by then: one for each of the tests that load
ORDERS = {
    "ours": "import compress, transformers",
    "theirs": "import transformers, compress",
    "theirs, filled": "import transformers; transformers.AutoModelForCausalLM; import compress",
}


def test_plain_from_pretrained(native: Callable[..., Path], text_file: Path) -> None:
    """Every family, and every dtype. Mixtral's tensors are called otherwise on disk; some releases read renamed ones in
    their stored dtype."""
    calibrated = {"calib": str(text_file), "samples": 4, "seq_len": 64}
    jobs: list[tuple[Path, str, Any]] = [(native(f, "nf4 double_quant=true"), "auto", None) for f in FAMILIES]
    jobs += [
        (native("mixtral", "nf4 double_quant=true"), "float32", None),
        (native("llama", "rtn bits=4 group_size=32"), "float32", None),
        (native("llama", "rtn bits=4 group_size=32"), "bfloat16", None),
        (native("llama", "absmax activations=token"), "float16", None),
        (native("llama", "spqr group_size=16", **calibrated), "float32", None),
    ]
    found = loaded(*jobs, imports=ORDERS["ours"])
    for job, one in zip(jobs, found, strict=True):
        assert one["dtypes"] == ["torch.bfloat16" if job[1] == "auto" else f"torch.{job[1]}"]
    for family, one in zip(FAMILIES, found, strict=False):
        if family == "falcon":
            assert one["packed"] == 0
            assert len(one["said"]) == 1
            assert "held dense" in one["said"][0]
        else:
            assert one["packed"] >= 8
            assert not one["said"]


def test_device_map(native: Callable[..., Path]) -> None:
    pytest.importorskip("accelerate")
    folder = native("llama", "nf4 double_quant=true")
    places = ((folder, "auto", w) for w in ("cpu", {"": "cpu"}, "auto"))
    assert all(one["packed"] == 14 for one in loaded(*places, imports=ORDERS["theirs, filled"]))


def test_transformers_first(native: Callable[..., Path]) -> None:
    (found,) = loaded((native("llama", "nf4 double_quant=true"), "auto", None), imports=ORDERS["theirs"])
    assert found["packed"] == 14


def test_importing_compress_is_light() -> None:
    code = "import compress, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = python(code)
    assert done.stdout.strip() == "[]"
    again = (
        "import compress, sys\nfrom compress import integration\nintegration.install(); integration.install()\n"
        "assert sum(type(f).__name__ == '_Watch' for f in sys.meta_path) == 1\n"
        "import transformers.quantizers.auto as table\n"
        "assert 'compress' in table.AUTO_QUANTIZER_MAPPING\n"
        "assert not any(type(f).__name__ == '_Watch' for f in sys.meta_path)\n"
        "integration.install(); integration.install()\n"
        "import inspect; assert 'def register_quantizer' in inspect.getsource(table)\n"
        "import pickle; made = table.AUTO_QUANTIZATION_CONFIG_MAPPING['compress'](version=1)\n"
        "assert pickle.loads(pickle.dumps(made)).to_dict() == {'version': 1, 'quant_method': 'compress'}\n"
    )
    done = python(again)
    assert done.returncode == 0, done.stderr


def test_without_compress_transformers_says_so(native: Callable[..., Path]) -> None:
    """It warns of the unknown method and draws random weights: what `import compress` is for."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "_, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "print(len(info['missing_keys']), len(info['unexpected_keys']))"
    )
    done = python(code, str(native("llama", "nf4 double_quant=true")))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Unknown quantization type, got compress" in done.stderr
    missing, unexpected = map(int, done.stdout.split())
    assert missing == 14
    assert unexpected == 14 * 4


def test_saving_is_refused_clearly(native: Callable[..., Path], tmp_path: Path) -> None:
    code = (
        "import sys, compress; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert model.config.quantization_config.quant_method == 'compress'\n"
        "import copy; copy.deepcopy(model)\n"
        "model.save_pretrained(sys.argv[2])"
    )
    done = python(code, str(native("llama", "nf4 double_quant=true")), str(tmp_path / "saved"))
    assert done.returncode != 0
    assert "copy its folder instead" in done.stderr
    assert "is not serializable" in done.stderr


def test_what_the_loader_cannot_fill_is_refused(native: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = native("qwen3_moe", "nf4", exclude=("*.up_proj",))
    with pytest.raises(compress.CompressError, match=r"load the folder with compress\.load"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_transformers_with_other_tables_goes_on() -> None:
    """A table without the names that are expected is left alone, with a warning."""
    from types import ModuleType

    from compress import integration

    table = ModuleType("table")
    with pytest.warns(UserWarning, match="another table of quantisers"):
        integration._register(table)
