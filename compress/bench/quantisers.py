"""Other tools that run GPTQ, where they can be imported: their solver on a layer's tensors, and whole runs on a model.

Their own code with their own defaults, but for the grid, the damp and natural order, which are as ours are told to be.
What a tool consumes is made anew before each call, outside the clock. Checked with llmcompressor 0.14.0.1 and gptqmodel
7.7.0, which cannot share an environment; each takes the figures of the other from where they are quoted.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.bench.stages import Layer, Setting

DAMP = 0.01


@dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
        name: on tables.
        package: that is imported.
        hessian: given a layer, what takes its inputs in once.
        ready: given a layer, what quantises it: factor and loop. Called once; gives the dequantised weight.
        run: of a model's folder and token rows [n, seq] a checkpoint in another folder.
    """

    name: str
    package: str
    hessian: Callable[[Layer], Callable[[], object]]
    ready: Callable[[Layer, Setting], Callable[[], Tensor]]
    run: Callable[[Path, Tensor, Path, Setting, torch.device], None]

    def absent(self) -> str:
        """Why it cannot run; "" if it can be tried."""
        return "" if find_spec(self.package) is not None else f"{self.package} is not installed"


@functools.cache
def quoted() -> dict[str, Any]:
    """What was measured of them on one card: see quoted_solver.json."""
    text = Path(__file__).with_name("quoted_solver.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _linear(layer: Layer) -> nn.Linear:
    rows, width = layer.weight.shape
    made = nn.Linear(width, rows, bias=False, device="meta")
    made.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    return made


# --- llm-compressor -------------------------------------------------------------------------------------------------


def _llmcompressor_hessian(layer: Layer) -> Callable[[], object]:
    helpers: Any = import_module("llmcompressor.modifiers.gptq.helpers")
    module = _linear(layer)
    total, seen = helpers.make_empty_hessian(module), torch.zeros((), device=layer.x.device)
    return lambda: helpers.accumulate_hessian(layer.x[None], module, total, seen)


def _llmcompressor_ready(layer: Layer, setting: Setting) -> Callable[[], Tensor]:
    solver: Any = import_module("llmcompressor.modifiers.gptq.gptq_quantize")
    grids: Any = import_module("compressed_tensors.quantization")
    utils: Any = import_module("compressed_tensors.quantization.utils")
    size = layer.weight.shape[1] if setting.group == -1 else setting.group
    kind = {"strategy": "channel"} if setting.group == -1 else {"strategy": "group", "group_size": size}
    symmetric = not setting.asymmetric
    arguments = grids.QuantizationArgs(num_bits=setting.bits, type="int", symmetric=symmetric, **kind)
    weight = layer.weight.float()
    parts = weight.reshape(len(weight), -1, size)
    scale, zero = utils.calculate_qparams(parts.amin(-1), parts.amax(-1), arguments)
    given = weight[None].clone(), layer.hessian[None].clone(), scale[None], zero[None]

    def run() -> Tensor:
        out: Tensor = solver.quantize_weight(*given, None, arguments, percdamp=DAMP)[0][0]
        return out

    return run


def _llmcompressor_run(source: Path, rows: Tensor, out: Path, setting: Setting, device: torch.device) -> None:
    transformers: Any = import_module("transformers")
    data: Any = import_module("datasets")
    entry: Any = import_module("llmcompressor")
    gptq: Any = import_module("llmcompressor.modifiers.gptq")
    tokens = {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
    weights = {
        "num_bits": setting.bits, "type": "int", "symmetric": not setting.asymmetric, "strategy": "group",
        "group_size": setting.group,
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    entry.oneshot(
        model=model, dataset=data.Dataset.from_dict(tokens), processor=tokenizer, max_seq_length=rows.shape[1],
        recipe=gptq.GPTQModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
        ),
        num_calibration_samples=len(rows), shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(out, save_compressed=True)


# --- GPTQModel ------------------------------------------------------------------------------------------------------


def _gptqmodel_task(layer: Layer, setting: Setting) -> Any:
    solver: Any = import_module("gptqmodel.quantization.gptq")
    task = solver.GPTQ(_linear(layer), _gptqmodel_config(setting, offload_to_disk=False))
    task.quantizer.configure(perchannel=True)
    return task


def _gptqmodel_config(setting: Setting, **more: Any) -> Any:
    config: Any = import_module("gptqmodel.quantization.config")
    return config.QuantizeConfig(
        bits=setting.bits, group_size=setting.group, sym=not setting.asymmetric, desc_act=False, damp_percent=DAMP,
        act_group_aware=False, **more,
    )  # fmt: skip


def _gptqmodel_hessian(layer: Layer) -> Callable[[], object]:
    task = _gptqmodel_task(layer, Setting())
    return lambda: task.add_batch(layer.x[None], None, batch_index=0)


def _gptqmodel_ready(layer: Layer, setting: Setting) -> Callable[[], Tensor]:
    task = _gptqmodel_task(layer, setting)
    task.add_batch(layer.x[None], None, batch_index=0)

    def run() -> Tensor:
        out: Tensor = task.quantize()[0].detach()
        return out

    return run


def _gptqmodel_run(source: Path, rows: Tensor, out: Path, setting: Setting, device: torch.device) -> None:
    entry: Any = import_module("gptqmodel")
    model = entry.GPTQModel.load(str(source), _gptqmodel_config(setting), device=str(device))
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows.tolist()], batch_size=8)
    model.save(str(out))


TOOLS: tuple[Tool, ...] = (
    Tool("llm-compressor", "llmcompressor", _llmcompressor_hessian, _llmcompressor_ready, _llmcompressor_run),
    Tool("GPTQModel", "gptqmodel", _gptqmodel_hessian, _gptqmodel_ready, _gptqmodel_run),
)
