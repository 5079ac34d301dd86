"""Accuracy on tasks, by lm-eval (EleutherAI's lm-evaluation-harness), which loads, words and scores them all.

It is handed the model as `compress.load` makes it, packed layers packed, and its own tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError
from compress.textfiles import attempt

_BATCH = {"cuda": 64, "cpu": 8}
_NO_DATA = "no hub access? a task's data set must be in the cache, or a local file that its YAML names"
_NAME = re.compile(r"^(?:task|group):\s*['\"]?([\w.-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval knows.

    Attributes:
        names: by which it finds them.
        manager: its TaskManager.
    """

    names: tuple[str, ...]
    manager: Any


def find(asked: Sequence[str]) -> Tasks:
    """Look the tasks up, before anything is computed.

    Args:
        asked: names of lm-eval, or paths of YAML files that describe a task for it.

    Raises:
        CompressError: lm-eval is not installed, it knows no such task, no such file; a data set cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError as error:
        what = f"tasks need the package lm-eval ({error})"
        raise CompressError(what, "--tasks", "pip install 'compress-llm[eval]'") from None
    files = [Path(name) for name in asked if name.endswith((".yaml", ".yml"))]
    names = [_named(Path(name)) if Path(name) in files else name for name in asked]
    folders = sorted({str(file.resolve().parent) for file in files})
    manager = attempt(lambda: TaskManager(include_path=folders or None), "--tasks", "check the YAML files")
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        what = f"lm-eval {metadata.version('lm-eval')} knows no task {unknown[0]!r}"
        raise CompressError(what, "--tasks", "lm-eval ls tasks lists them; of your own, pass the YAML file")
    where, remedy = f"--tasks {','.join(names)}", _NO_DATA
    attempt(lambda: get_task_dict(names, manager), where, remedy)  # fetches their data sets, into the cache
    return Tasks(tuple(names), manager)


def _named(file: Path) -> str:
    """The name that a YAML file gives its task."""
    try:
        found = _NAME.search(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(f"cannot be read ({error.strerror})", str(file), "check the path") from None
    if found is None:
        raise CompressError("names no task", str(file), "it needs a line `task: NAME`")
    return found[1]


def run(
    tasks: Tasks,
    folder: Path,
    tokenizer: Any,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Every task on one checkpoint, dense or packed.

    Returns:
        {"lm_eval": version, "results": {task: {"version", "shots", "samples", "metrics": {name: {"value", "stderr",
        "higher_is_better"}}}}}, `name` being lm-eval's "metric" or "metric,filter".

    Raises:
        CompressError: the model does not load, or lm-eval fails on the task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from compress.loading import load

    model = load(
        folder, device=str(device), dtype=str(dtype).removeprefix("torch."), trust_remote_code=trust_remote_code
    )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH[device.type])
    found = attempt(
        lambda: simple_evaluate(
            model=wrapped, tasks=list(tasks.names), task_manager=tasks.manager, log_samples=False, bootstrap_iters=10000
        ),
        f"--tasks {','.join(tasks.names)}",
        _NO_DATA,
    )
    results = {name: _result(name, found) for name in found["results"]}
    return {"lm_eval": metadata.version("lm-eval"), "results": results}


def _result(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """One task's part of what lm-eval gives: "acc,none" and "acc_stderr,none" side by side."""
    given = found["results"][name]
    metrics: dict[str, Any] = {}
    for key, value in given.items():
        metric, comma, rule = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = given.get(f"{metric}_stderr,{rule}")
        metrics[metric if rule == "none" else key] = {
            "value": value,
            "stderr": error if isinstance(error, float) else None,
            "higher_is_better": found.get("higher_is_better", {}).get(name, {}).get(metric),
        }
    samples = found.get("n-samples", {}).get(name, {}).get("effective")
    return {
        "version": found.get("versions", {}).get(name),
        "shots": found.get("n-shot", {}).get(name),
        "samples": samples,
        "metrics": metrics,
    }
