"""What tests of CUDA kernels share: emulate.py beside this file, and a folder for its builds."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def emulate() -> ModuleType:
    """emulate.py as a module."""
    name = "kernels_emulate"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("emulate.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    if not module.available():
        pytest.skip("the kernels' CPU build needs g++ on Linux")
    return module


@pytest.fixture(scope="session")
def build(emulate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """build(file, defines): a kernel file compiled for this CPU, once a session."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # what all workers share
    return partial(emulate.build, work=base / "emulated")
