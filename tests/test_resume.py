"""A run that is killed goes on where it stopped, and ends with the bytes of a run that nobody disturbed.

Children are forked from this process, so that a run costs half a second, and killed by a real SIGKILL at a chosen
rename: every step of a run ends with one. One test does the same from outside, with the clock alone.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress import api, cli, hidden, journal, output, pipeline
from compress.ahead import Begun, Outbox
from compress.blocks import BlockModel
from compress.errors import CompressError

pytestmark = pytest.mark.xdist_group("resume")  # else each worker would make the undisturbed runs

BLOCKS = 4
VARIANTS = {
    "gptq": ["gptq"],
    "rtn": ["rtn"],
    "gptq format": ["gptq", "--format", "gptq", "--act-order", "groups", "--asymmetric"],
    "rescaled norms": ["smoothquant"],
    "bias corrected": ["equalize", "--bias-correction", "measured"],
    "survey": ["int8", "--rule", "paper", "--threshold", "2"],
    "sparse": ["sparsegpt", "--pattern", "2:4", "--bits", "4", "--group-size", "32"],
    "outliers": ["spqr", "--bits", "3"],
    "true sequential": ["gptq", "--true-sequential", "--asymmetric", "--bits", "3"],
}


class Runs:
    """The command line on the toy model, in this process, in a forked one, or in a new one."""

    def __init__(self, root: Path, model: Path, text: Path) -> None:
        self.root, self.model, self.text = root, model, text
        self.out, self.partial = root / "out", root / "out.partial"

    def args(self, variant: str, *more: Any) -> list[str]:
        method, *settings = VARIANTS[variant]
        given = [method, self.model, "-o", self.out, "--device", "cpu", *settings]
        if method != "rtn":
            given += ["--calib", self.text, "--samples", 32, "--seq-len", 64]
        return [str(a) for a in (*given, *([] if "--eval" in more else ["--no-eval"]), *more)]

    def here(self, args: list[str]) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["compress", *args])
            with pytest.raises(SystemExit) as stop:
                cli.main()
        return int(stop.value.code or 0)

    def forked(self, args: list[str], prepare: Callable[[], None]) -> int:
        """Exit code of the command in a child; `prepare` runs there first. -9 when it was killed."""
        return os.waitstatus_to_exitcode(os.waitpid(self.begun(args, prepare), 0)[1])

    def begun(self, args: list[str], prepare: Callable[[], None] = lambda: None) -> int:
        """The id of such a child, at work."""
        child = os.fork()
        if child == 0:
            code = 99
            try:
                prepare()
                code = self.here(args)
            finally:
                os._exit(code)
        return child

    def started(self, args: list[str], first: str = "") -> subprocess.Popen[bytes]:
        """first: code that runs before the command."""
        code = f"{first}\nfrom compress.cli import main; main()"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *args]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def blocks(self) -> dict[str, int]:
        """Finished blocks, with the time each was written."""
        return {p.name: p.stat().st_mtime_ns for p in self.partial.glob("block-*.json")}

    def files(self) -> dict[str, bytes]:
        """Everything in the output that does not hold clock times."""
        assert self.out.is_dir()
        return {p.name: p.read_bytes() for p in self.out.iterdir() if p.name not in output.TIMED}


def kill_at(number: int, after: bool = False) -> Callable[[], None]:
    """For `forked`: SIGKILL at the number-th rename, before or after it."""

    def prepare() -> None:
        replace, seen = os.replace, [0]

        def counting(source: Any, target: Any) -> None:
            seen[0] += 1
            if seen[0] == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = counting
        Begun.done = lambda self: self._result.exception() is None  # type: ignore[method-assign]  # waits: one order

    return prepare


@pytest.fixture
def runs(tmp_path: Path, toy: Path, text_file: Path) -> Runs:
    return Runs(tmp_path, toy, text_file)


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, toy: Path, text_file: Path
) -> Callable[[str], dict[str, bytes]]:
    """The files of a variant's run that nobody disturbed; made once."""
    made: dict[str, dict[str, bytes]] = {}

    def files(variant: str) -> dict[str, bytes]:
        if variant not in made:
            runs = Runs(tmp_path_factory.mktemp("undisturbed"), toy, text_file)
            assert runs.here(runs.args(variant)) == 0
            made[variant] = runs.files()
            assert {p.name for p in runs.root.iterdir()} == {"out"}
        return made[variant]

    return files


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that were solved in this process."""
    seen: list[int] = []
    original = pipeline.compress_block

    def counting(model: Any, plan: Any, block: int, *rest: Any) -> Any:
        seen.append(block)
        return original(model, plan, block, *rest)

    monkeypatch.setattr(pipeline, "compress_block", counting)
    return seen


# fingerprint, then tensors and records of each block, one shard, config, card, report, record, the final rename
STEPS = 1 + 2 * BLOCKS + 1 + 1 + 3 + 1


@pytest.mark.parametrize("variant", ["gptq", "rtn", "gptq format", "true sequential"])
def test_same_seed_same_bytes(runs: Runs, undisturbed: Any, variant: str) -> None:
    assert runs.forked(runs.args(variant), lambda: None) == 0
    assert runs.files() == undisturbed(variant)


#: every rename of a quick run, and of a calibrated one the first, some of its blocks and its assembly
KILLS = [("rtn", step) for step in range(1, STEPS + 1)] + [("gptq", step) for step in (1, 2, 3, 7, 10, 13)]


@pytest.mark.parametrize(("variant", "step"), KILLS)
def test_killed_before_every_rename(runs: Runs, undisturbed: Any, solved: list[int], variant: str, step: int) -> None:
    assert runs.forked(runs.args(variant), kill_at(step)) == -signal.SIGKILL
    assert not runs.out.exists()
    finished = len(runs.blocks())
    assert finished == min(max(0, step - 2) // 2, BLOCKS)
    assert runs.here(runs.args(variant)) == 0
    assert solved == list(range(finished, BLOCKS)), "a finished block was solved again"
    assert runs.files() == undisturbed(variant)
    assert {p.name for p in runs.root.iterdir()} == {"out"}


@pytest.mark.parametrize("step", [3, 10])
@pytest.mark.parametrize("variant", list(VARIANTS)[2:])
def test_killed_in_other_variants(runs: Runs, undisturbed: Any, solved: list[int], variant: str, step: int) -> None:
    """Whatever a block stores, and what was learned before it, comes back as it was: zero points, groups in activation
    order, rescaled norms and biases, a survey of all blocks, quantised inputs."""
    assert runs.forked(runs.args(variant), kill_at(step, after=True)) == -signal.SIGKILL
    finished = len(runs.blocks())
    assert finished == (step - 1) // 2
    assert runs.here(runs.args(variant)) == 0
    assert solved == list(range(finished, BLOCKS))
    assert runs.files() == undisturbed(variant)


def test_killed_with_activations_on_disk(runs: Runs, undisturbed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What spilled is not trusted after a kill: activations are computed again from the finished blocks."""
    monkeypatch.setattr(hidden, "choose_tier", lambda *given: "disk")
    assert runs.forked(runs.args("gptq"), kill_at(6)) == -signal.SIGKILL
    assert (runs.partial / "hidden.bin").stat().st_size > 0
    (runs.partial / "hidden.bin").write_bytes(b"nonsense")
    assert runs.here(runs.args("gptq")) == 0
    assert runs.files() == undisturbed("gptq")


def short_of_memory() -> None:
    """For `forked`: from block 1 on, no more than 4 rows go through a block at once."""
    run = BlockModel.run

    def small(model: Any, block: int, states: Any, shape: Any) -> Any:
        if block and len(states) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(model, block, states, shape)

    BlockModel.run = small  # type: ignore[method-assign]


def test_goes_on_with_as_many_rows_as_there_was_memory_for(
    runs: Runs, tmp_path_factory: pytest.TempPathFactory, toy: Path, text_file: Path
) -> None:
    """Rows are halved in block 1. Killed after block 2, with memory enough afterwards: each finished block is run as it
    was, and those to come as they would have been."""
    other = Runs(tmp_path_factory.mktemp("short"), toy, text_file)
    assert other.forked(other.args("gptq"), short_of_memory) == 0
    expected = other.files()
    assert b"out of device memory with 8 rows at once: 4 from there on" in expected["README.md"]

    def prepare() -> None:
        short_of_memory()
        kill_at(7, after=True)()

    assert runs.forked(runs.args("gptq"), prepare) == -signal.SIGKILL
    assert len(runs.blocks()) == 3
    assert runs.here(runs.args("gptq")) == 0
    assert runs.files() == expected


def test_killed_again_and_again(runs: Runs, undisturbed: Any) -> None:
    """Each life finishes one block and dies in the next."""
    for life in range(BLOCKS):
        assert runs.forked(runs.args("gptq"), kill_at(4 if life == 0 else 3)) == -signal.SIGKILL
        assert len(runs.blocks()) == life + 1
    assert runs.here(runs.args("gptq")) == 0
    assert runs.files() == undisturbed("gptq")


def test_killed_after_the_final_rename(runs: Runs, undisturbed: Any, capsys: Any) -> None:
    """The output is complete; only the work folder is left over."""
    assert runs.forked(runs.args("rtn"), kill_at(STEPS, after=True)) == -signal.SIGKILL
    assert runs.files() == undisturbed("rtn")
    assert runs.here(runs.args("rtn")) == 2
    assert "the output exists" in capsys.readouterr().err
    assert runs.here(runs.args("rtn", "--overwrite")) == 0
    assert runs.files() == undisturbed("rtn")
    assert {p.name for p in runs.root.iterdir()} == {"out"}


def test_killed_while_it_tidies(runs: Runs, undisturbed: Any) -> None:
    def prepare() -> None:
        def half(folder: Path, **options: Any) -> None:
            (folder / "block-00001.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

        shutil.rmtree = half  # type: ignore[assignment]

    assert runs.forked(runs.args("rtn"), prepare) == -signal.SIGKILL
    assert runs.files() == undisturbed("rtn")
    assert runs.here(runs.args("rtn", "--overwrite", "--bits", "3")) == 0, "what is left belongs to no run"
    assert {p.name for p in runs.root.iterdir()} == {"out"}


def test_head_behind_the_last_block(runs: Runs, tmp_path: Path, make_model: Any, tokenizer: Any) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=320,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    runs.model = make_model(config, tmp_path / "untied", tokenizer)
    args = runs.args("gptq", "--lm-head")
    assert runs.here(args) == 0
    expected = runs.files()
    for step in (6, 7):  # the head's tensors, the head's records
        shutil.rmtree(runs.out)
        assert runs.forked(args, kill_at(step)) == -signal.SIGKILL
        assert len(runs.blocks()) == 2
        assert runs.here(args) == 0
        assert runs.files() == expected


# --- from outside: processes, the clock and SIGKILL


def wait_for(ended: Callable[[], bool], reached: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not ended() and not reached():
        assert time.monotonic() < until
        time.sleep(0.001)


def ended(child: int) -> bool:
    """It is not waited for, so that kill still finds it."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def test_kill_9_from_outside(runs: Runs, undisturbed: Any) -> None:
    """Forked too: an interpreter that starts takes longer than the run, and none is killed while it does."""
    args = runs.args("gptq")
    moments: list[Callable[[], bool]] = [
        lambda: runs.partial.exists(),
        lambda: (runs.partial / "block-00001.json").exists(),
        lambda: (runs.partial / "final").exists(),
    ]
    for moment in moments:
        before = runs.blocks()
        child = runs.begun(args)
        wait_for(partial(ended, child), moment)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (-signal.SIGKILL, 0)
        if not runs.out.exists():
            assert before.items() <= runs.blocks().items(), "a finished block was written again"
    if not runs.out.exists():
        assert len(runs.blocks()) == BLOCKS
        assert runs.here(args) == 0
    assert runs.files() == undisturbed("gptq")


LONG_THIRD = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from compress import pipeline
solve = pipeline.compress_block
def slow(model, plan, block, *rest):
    if block == 2:
        time.sleep(60)
    return solve(model, plan, block, *rest)
pipeline.compress_block = slow
"""


def test_ctrl_c(runs: Runs, undisturbed: Any) -> None:
    """SIGINT while the third block is at work: exit code 130, and the message is the command to type."""
    long = runs.args("gptq")
    process = runs.started(long, LONG_THIRD)
    wait_for(lambda: process.poll() is not None, (runs.partial / "block-00000.json").exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = err.decode().splitlines()
    assert len(lines) == 1, lines
    finished = len(runs.blocks())
    assert lines[0].startswith(
        f"{runs.partial}: stopped; {finished} finished blocks are kept; to go on, type: compress"
    )
    assert lines[0].endswith(" ".join(long))
    assert not runs.out.exists()


def test_ctrl_c_before_the_first_block(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "load_tokenizer", stop)
    assert runs.here(runs.args("gptq")) == 130
    err = capsys.readouterr().err
    assert err.startswith("stopped before a block was finished; to go on, type: compress gptq ")
    assert err.count("\n") == 1
    assert not runs.partial.exists()


def test_two_at_once(runs: Runs, undisturbed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def stop_for_a_while() -> None:
        original = pipeline.assemble

        def assemble(*args: Any) -> Any:
            while not (runs.root / "go").exists():
                time.sleep(0.01)
            return original(*args)

        pipeline.assemble = assemble

    child = runs.begun(runs.args("rtn"), stop_for_a_while)
    until = time.monotonic() + 60
    while len(runs.blocks()) < BLOCKS:
        assert time.monotonic() < until
        time.sleep(0.01)
    for more in ([], ["--fresh"], ["--bits", "3"]):
        assert runs.here(runs.args("rtn", *more)) == 2
        assert f"error: {runs.out}: another run is writing this output; " in capsys.readouterr().err
    (runs.root / "go").touch()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert runs.files() == undisturbed("rtn")


# --- failures


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_disk_full_at_every_rename(
    runs: Runs, undisturbed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    replace, seen = os.replace, [0]

    def full(source: Any, target: Any) -> None:
        seen[0] += 1
        if seen[0] == step:
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert runs.here(runs.args("rtn")) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {runs.partial}/")
    assert "No space left on device" in err
    assert "the same command again" in err
    assert err.count("\n") == 1
    assert not runs.out.exists()
    assert runs.here(runs.args("rtn")) == 0
    assert runs.files() == undisturbed("rtn")


def test_a_full_disk_while_two_blocks_are_written(
    runs: Runs, undisturbed: Any, solved: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU. The second is on the disk before the first fails; it does not count, and is written again."""
    storing, second = journal.Journal.store, threading.Event()

    def full(self: journal.Journal, block: int, tensors: Any) -> str:
        if block == 1:
            assert second.wait(60.0)
            raise CompressError("its 7 bytes cannot be written (No space left on device)", "block-00001.safetensors")
        digest = storing(self, block, tensors)
        if block == 2:
            second.set()
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "store", full)
        patch.setattr(pipeline, "Outbox", lambda lane, timed, together: Outbox(lane, timed, 2))
        assert runs.here(runs.args("rtn")) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert len(runs.blocks()) == 1
        solved.clear()
        patch.setattr(journal.Journal, "store", storing)
        assert runs.here(runs.args("rtn")) == 0
    assert solved == list(range(1, BLOCKS))
    assert runs.files() == undisturbed("rtn")


PLACES = [
    (journal, "save_tensors", 0),
    (journal.Journal, "store", 0),
    (journal.Journal, "count", 0),
    (pipeline, "assemble", BLOCKS),
    (output, "write_shards", BLOCKS),
    (output, "carry_over", BLOCKS),
    (pipeline, "verify", BLOCKS),
    (pipeline, "finish", BLOCKS),
    (journal.Journal, "publish", BLOCKS),
]


@pytest.mark.parametrize(("owner", "name", "finished"), PLACES, ids=lambda value: str(value)[:20])
def test_exception_anywhere(
    runs: Runs,
    undisturbed: Any,
    solved: list[int],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    finished: int,
) -> None:
    """Also one that is our own mistake: the lock is free afterwards, and the same command goes on."""

    def fails(*args: Any, **kwargs: Any) -> None:
        raise ArithmeticError("ours")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        patch.setattr(sys, "argv", ["compress", *runs.args("gptq")])
        with pytest.raises(ArithmeticError, match="ours"):
            cli.main()
    left = {p.name for p in runs.root.iterdir()}
    assert left == {"out.partial"} or not (left or finished)
    assert len(runs.blocks()) == finished
    solved.clear()
    assert runs.here(runs.args("gptq")) == 0
    assert solved == list(range(finished, BLOCKS))
    assert runs.files() == undisturbed("gptq")


# --- an output that is replaced


@pytest.fixture
def old(runs: Runs) -> dict[str, bytes]:
    """An earlier output under the same name."""
    assert runs.here(runs.args("rtn", "--bits", "8")) == 0
    (runs.out / "notes.txt").write_text("the user's")
    return runs.files()


@pytest.mark.parametrize("step", [1, 6, STEPS - 1, STEPS, STEPS + 1])
def test_overwrite_killed(runs: Runs, undisturbed: Any, old: dict[str, bytes], step: int) -> None:
    args = runs.args("rtn", "--overwrite")
    assert runs.forked(args, kill_at(step)) == -signal.SIGKILL
    if step <= STEPS:
        assert runs.files() == old
    else:  # between the two renames of the replacement
        assert not runs.out.exists()
        assert runs.here(runs.args("rtn")) == 2  # the next command, even one that is refused, puts it back
        assert runs.files() == old
    assert runs.here(args) == 0
    assert runs.files() == undisturbed("rtn")
    assert {p.name for p in runs.root.iterdir()} == {"out"}


@pytest.mark.parametrize("place", ["compress_block", "assemble", "verify"])
def test_overwrite_failed_half_way(
    runs: Runs, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", "disk")

    monkeypatch.setattr(pipeline, place, fails)
    assert runs.here(runs.args("rtn", "--overwrite")) == 2
    assert runs.files() == old


def test_without_overwrite_nothing_is_touched(runs: Runs, old: dict[str, bytes]) -> None:
    assert runs.here(runs.args("rtn")) == 2
    assert runs.files() == old
    assert {p.name for p in runs.root.iterdir()} == {"out"}


# --- a different run


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory, toy: Path, text_file: Path) -> Path:
    """The work folder of a GPTQ run that was killed in its third block."""
    runs = Runs(tmp_path_factory.mktemp("stopped"), toy, text_file)
    assert runs.forked(runs.args("gptq"), kill_at(6)) == -signal.SIGKILL
    return runs.partial


@pytest.fixture
def stopped(runs: Runs, stopped_once: Path) -> Iterator[Runs]:
    """The same, a copy for each test; it must not change when a run is refused."""
    shutil.copytree(stopped_once, runs.partial)
    before = {p.name: p.read_bytes() for p in runs.partial.iterdir()}
    yield runs
    if not runs.out.exists():
        assert {p.name: p.read_bytes() for p in runs.partial.iterdir()} == before


DIFFERENT = {
    "bits": (["--bits", "3"], "method.bits (was 4, is 3)"),
    "group size": (["--group-size", "32"], "method.group_size (was 64, is 32)"),
    "descent": (["--descent", "0"], "method.descent (was 1, is 0)"),
    "seed": (["--seed", "1"], "seed (was 0, is 1)"),
    "samples": (["--samples", "31"], "calibration.sha256"),
    "seq len": (["--seq-len", "32"], "calibration.sha256"),
    "format": (["--format", "gptq"], "format (was compressed-tensors, is gptq)"),
    "include": (["--include", "*q_proj"], "layers.include (was [], is ['*q_proj'])"),
    "exclude": (["--exclude", "*q_proj"], "layers.exclude"),
    "true sequential": (["--true-sequential"], "true_sequential (was False, is True)"),
    "dtype": (["--dtype", "bfloat16"], "dtype (was float32, is bfloat16)"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_other_settings_are_refused(stopped: Runs, capsys: pytest.CaptureFixture[str], case: str) -> None:
    more, says = DIFFERENT[case]
    assert stopped.here(stopped.args("gptq", *more)) == 2
    refused(stopped, capsys, says)


def refused(stopped: Runs, capsys: pytest.CaptureFixture[str], says: str) -> None:
    err = capsys.readouterr().err
    assert err.startswith(f"error: {stopped.partial}: an unfinished run differs in ")
    assert says in err
    assert "--fresh" in err
    assert err.count("\n") == 1


def test_low_memory_is_no_other_run(stopped: Runs, solved: list[int], undisturbed: Any) -> None:
    """It goes on with the batches that it began with, so it ends with the same bytes."""
    assert stopped.here(stopped.args("gptq", "--low-memory")) == 0
    assert solved == [2, 3]
    assert stopped.files() == undisturbed("gptq")


def test_other_method_is_refused(stopped: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped.here(stopped.args("rtn")) == 2
    refused(stopped, capsys, "method.name (was gptq, is rtn)")


def test_other_text_is_refused(stopped: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.txt"
    other.write_text(stopped.text.read_text()[7:])
    stopped.text = other
    assert stopped.here(stopped.args("gptq")) == 2
    refused(stopped, capsys, "calibration.sha256")


def test_one_byte_of_a_weight_is_refused(stopped: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped.model = shutil.copytree(stopped.model, tmp_path / "changed" / "toy")
    shard = stopped.model / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert stopped.here(stopped.args("gptq")) == 2
    refused(stopped, capsys, "checkpoint.model.safetensors (was ")


def test_other_config_is_refused(stopped: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped.model = shutil.copytree(stopped.model, tmp_path / "changed" / "toy")
    config = stopped.model / "config.json"
    config.write_text(config.read_text() + " ")
    assert stopped.here(stopped.args("gptq")) == 2
    refused(stopped, capsys, "checkpoint.config.json (was ")


def test_other_version_is_refused(
    stopped: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compress, "__version__", "99.0")
    assert stopped.here(stopped.args("gptq")) == 2
    refused(stopped, capsys, "versions.compress (was ")


def test_fresh_starts_over(stopped: Runs, solved: list[int], undisturbed: Any) -> None:
    (stopped.partial / "block-00000.safetensors").write_bytes(b"damaged")
    assert stopped.here(stopped.args("gptq", "--fresh")) == 0
    assert solved == list(range(BLOCKS))
    assert stopped.files() == undisturbed("gptq")


@pytest.mark.parametrize("block", [0, 1])
def test_a_changed_block_is_noticed(runs: Runs, stopped_once: Path, capsys: Any, block: int) -> None:
    shutil.copytree(stopped_once, runs.partial)
    file = runs.partial / f"block-0000{block}.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert runs.here(runs.args("gptq")) == 2
    err = capsys.readouterr().err
    assert err == f"error: {file}: is gone or changed since it was written (sha256); pass --fresh to start over\n"
    assert not runs.out.exists()


def test_a_changed_block_is_noticed_without_calibration(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """RTN reads a finished block only when it assembles the output."""
    assert runs.forked(runs.args("rtn"), kill_at(6)) == -signal.SIGKILL
    file = runs.partial / "block-00000.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("weight_packed"))
    tensors[name][0, 0] ^= 1
    save_file(tensors, file)
    assert runs.here(runs.args("rtn")) == 2
    assert "block-00000.safetensors: is gone or changed" in capsys.readouterr().err
    assert not runs.out.exists()


def test_changed_records_are_noticed(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """The written file is compared with what the solver returned, not with the journal's word for it."""
    assert runs.forked(runs.args("rtn"), kill_at(6)) == -signal.SIGKILL
    file = runs.partial / "block-00000.json"
    text = file.read_text()
    at = text.index('"sha256_dense": "') + 20
    file.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    assert runs.here(runs.args("rtn")) == 2
    assert "does not dequantise to what the solver returned; run again with --fresh" in capsys.readouterr().err
    assert not runs.out.exists()


def test_the_journal_holds_no_pickle(stopped_once: Path) -> None:
    assert {p.suffix for p in stopped_once.iterdir() if not p.name.endswith(".tmp")} <= {
        ".json",
        ".safetensors",
        ".bin",
    }
    for file in stopped_once.iterdir():
        raw = file.read_bytes()
        assert not raw.startswith((b"\x80", b"PK")), f"{file.name} is a pickle or an archive"
