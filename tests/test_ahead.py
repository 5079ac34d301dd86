"""Reading ahead and writing behind: that they overlap is shown by threads that wait for each other, not by a clock.

`Late` is a lane whose copies are made only when they are waited for, the worst that a GPU's stream may do: whoever
reads one before that reads garbage.
"""

from __future__ import annotations

import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor as Thread
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import compress
from compress import ahead, flows, hidden, journal, passes, pipeline, stats
from compress.ahead import Begun, Outbox, Reader, in_order
from compress.blocks import BlockModel, all_finite
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.evaluate import states
from compress.lane import Here
from compress.types import Needs
from compress.weights import Weights

CPU = torch.device("cpu")
LONG = 60.0  # seconds after which a thread that was to come is taken to never come


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [t.name for t in set(threading.enumerate()) - before if t.name.startswith(("read-", "write-", "hidden-"))]
    assert not left


def garbage(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan")) if like.is_floating_point() else torch.full_like(like, 85)


class Late:
    """See the module's text."""

    device = CPU

    def __init__(self) -> None:
        self._queue: list[tuple[Tensor, Tensor]] = []
        self._done = 0
        self._lock = threading.Lock()

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def _later(self, target: Tensor, source: Tensor) -> Tensor:
        with self._lock:
            self._queue.append((target, source))
        return target

    def up(self, host: Tensor) -> Tensor:
        return self._later(garbage(host), host)

    def down(self, value: Tensor, into: Tensor | None = None) -> Tensor:
        return self._later(garbage(value) if into is None else into.copy_(garbage(value)), value)

    def mark(self) -> Any:
        lane, place = self, len(self._queue)

        class Mark:
            def synchronize(self) -> None:
                lane.run(place)

        return Mark()

    def run(self, place: int) -> None:
        with self._lock:
            while self._done < place:
                target, source = self._queue[self._done]
                target.copy_(source)
                self._queue[self._done] = (CPU, CPU)  # type: ignore[assignment]
                self._done += 1

    def arrive(self, values: Iterable[Tensor], mark: Any) -> None:
        mark.synchronize()


# --- the reader

reading = pytest.mark.usefixtures("hands")


@pytest.fixture(params=[1, 4])
def hands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that read: on a few cores one, on many four."""
    monkeypatch.setattr(ahead, "hands", lambda: request.param)


def names(*blocks: int) -> list[tuple[int, list[str]]]:
    return [(b, [f"{b}.a", f"{b}.b"]) for b in blocks]


def value(name: str, empty: Callable[[int], Tensor]) -> Tensor:
    made = empty(4)
    made.fill_(int(name.partition(".")[0]) + 1)
    return made


@reading
def test_every_block_gets_its_tensors() -> None:
    with Reader(names(0, 1, 4), value, Late()) as reader:
        for block in (0, 1, 4):
            found = reader.take(block)
            assert list(found) == [f"{block}.a", f"{block}.b"]
            assert all(t.tolist() == [block + 1] * 4 for t in found.values())
    assert reader.late == 0


@reading
def test_the_next_block_is_read_meanwhile_and_no_other() -> None:
    """Block 1 is read while block 0 is worked on; block 2 is not, however long that takes."""
    seen: list[str] = []
    ready = {1: threading.Event(), 2: threading.Event()}

    def read(name: str, empty: Callable[[int], Tensor]) -> Tensor:
        seen.append(name)
        for block, event in ready.items():
            if name == f"{block}.b":
                event.set()
        return value(name, empty)

    with Reader(names(0, 1, 2), read, Here()) as reader:
        reader.take(0)
        assert ready[1].wait(LONG), "block 1 was not read while block 0 was worked on"
        assert not any(name.startswith("2") for name in seen)
        reader.take(1)
        assert ready[2].wait(LONG)
        reader.take(2)


@reading
def test_at_most_two_blocks_are_alive() -> None:
    alive: set[str] = set()
    most = [0]

    def read(name: str, empty: Callable[[int], Tensor]) -> Tensor:
        made = value(name, empty)
        alive.add(name)
        weakref.finalize(made, alive.discard, name)
        most[0] = max(most[0], len({n.partition(".")[0] for n in alive}))
        return made

    with Reader(names(*range(6)), read, Here()) as reader:
        for block in range(6):
            found = reader.take(block)
            del found
    assert most[0] <= 2
    assert not alive


@reading
def test_an_error_waits_for_its_block() -> None:
    """Blocks 0 and 1 are worked on as if nothing were wrong; block 2 raises what its reader raised."""

    def read(name: str, empty: Callable[[int], Tensor]) -> Tensor:
        if name == "2.b":
            raise CompressError("the file ends inside tensor 2.b", "a file")
        return value(name, empty)

    with Reader(names(0, 1, 2, 3), read, Here()) as reader:
        reader.take(0)
        reader.take(1)
        with pytest.raises(CompressError, match=r"the file ends inside tensor 2\.b"):
            reader.take(2)


@reading
def test_leaving_stops_within_a_block() -> None:
    begun, go = threading.Event(), threading.Event()
    seen: list[str] = []

    def read(name: str, empty: Callable[[int], Tensor]) -> Tensor:
        seen.append(name)
        if name == "1.a":
            begun.set()
            assert go.wait(LONG)
        return value(name, empty)

    def leave() -> None:
        with Reader(names(0, 1, 2), read, Here()) as reader:
            reader.take(0)
            assert begun.wait(LONG)
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert sorted(seen)[:3] == ["0.a", "0.b", "1.a"]
    assert not any(name.startswith("2") for name in seen)


@pytest.mark.parametrize("cores", [None, 1, 2, 4, 16, 64])
def test_many_cores_read_at_once(cores: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tensors are begun as there are hands before the first of them has come; in order all the same."""
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    together = ahead.hands()
    assert together == {None: 1, 1: 1, 2: 1, 4: 1, 16: 4, 64: 4}[cores]
    meeting = threading.Barrier(together)

    def read(name: str, empty: Callable[[int], Tensor]) -> Tensor:
        meeting.wait(LONG)
        return value(name, empty)

    wanted = [(b, [f"{b}.{i}" for i in range(8)]) for b in (0, 1)]
    with Reader(wanted, read, Here()) as reader:
        for block, expected in wanted:
            assert list(reader.take(block)) == expected


@reading
def test_what_has_no_room_ahead_stays_and_is_counted() -> None:
    """A lane that cannot bring a tensor to its device hands it back; it moves when its block is loaded."""

    class Full(Here):
        device = torch.device("meta")

        def up(self, host: Tensor) -> Tensor:
            return host if int(host[0]) == 2 else host.to("meta")

    with Reader(names(0, 1, 2), value, Full()) as reader:
        assert [reader.take(b)[f"{b}.a"].is_meta for b in range(3)] == [True, False, True]
    assert reader.late == 1


# --- the outbox


def test_writing_goes_on_beside_the_next_block_in_order() -> None:
    go, order = threading.Event(), []

    def first() -> None:
        assert go.wait(LONG), "put waited for the task it was given"
        order.append("first")

    with Outbox(Here()) as outbox:
        outbox.put("write", first)
        outbox.check()  # nothing failed so far
        order.append("next block")
        go.set()
        outbox.put("write", lambda: order.append("second"))
        assert order[:2] == ["next block", "first"], "one at a time: the second waits for the first"
        outbox.flush()
    assert order == ["next block", "first", "second"]


def test_two_are_written_at_once_and_count_in_order() -> None:
    both, go, order = threading.Barrier(2), threading.Event(), []

    def task(i: int) -> int:
        both.wait(LONG) if i < 2 else None  # passes only where both run at once
        if i == 0:
            assert go.wait(LONG)
        order.append(f"{i} stored")
        return i

    def then(i: int) -> None:
        order.append(f"{i} counts")

    with Outbox(Here(), together=2) as outbox:
        outbox.put("write", partial(task, 0), then)
        outbox.put("write", partial(task, 1), then)
        while not order:
            outbox.check()
        go.set()
        outbox.put("write", partial(task, 2), then)
    assert order[0] == "1 stored"
    assert [o for o in order if o.endswith("counts")] == ["0 counts", "1 counts", "2 counts"]
    assert all(order.index(f"{i} stored") < order.index(f"{i} counts") for i in range(3))


@pytest.mark.parametrize("where", ["task", "then"])
def test_nothing_counts_after_what_failed(where: str) -> None:
    go, counted = threading.Event(), []

    def task(i: int) -> int:
        assert go.wait(LONG)
        return full() if (i, where) == (0, "task") else i

    def then(i: int) -> None:
        full() if (i, where) == (0, "then") else counted.append(i)

    def run() -> None:
        with Outbox(Here(), together=2) as outbox:
            for i in range(2):
                outbox.put("write", partial(task, i), then)
            go.set()

    with pytest.raises(CompressError, match="No space left"):
        run()
    assert not counted


def test_copies_are_there_when_tasks_run() -> None:
    seen: list[list[float]] = []
    with Outbox(Late()) as outbox:
        host = outbox.host(torch.arange(3.0))
        outbox.put("write", lambda: seen.append(host.tolist()))
        outbox.flush()
        found = outbox.later("digest", lambda t: t.tolist(), 2 * torch.arange(3.0))
        assert found.result(LONG) == [0.0, 2.0, 4.0]
    assert seen == [[0.0, 1.0, 2.0]]


def full() -> NoReturn:
    raise CompressError("its 7 bytes cannot be written (No space left on device)", "block-00000.safetensors")


@pytest.mark.parametrize("how", ["put", "flush", "leave", "check"])
def test_a_failed_write_is_told_at_the_next_chance(how: str) -> None:
    def run() -> None:
        with Outbox(Here()) as outbox:
            outbox.put("write", full)
            if how == "check":
                while True:
                    outbox.check()
            if how != "leave":
                outbox.put("write", lambda: None) if how == "put" else outbox.flush()
                raise AssertionError("went on")

    with pytest.raises(CompressError, match="No space left"):
        run()


def test_the_first_failure_is_told() -> None:
    """What goes wrong in a block while the one before cannot be written is not the cause."""

    def run(error: BaseException) -> None:
        with Outbox(Here()) as outbox:
            outbox.put("write", full)
            raise error

    with pytest.raises(CompressError, match="No space left"):
        run(CompressError("its output holds NaN"))
    with pytest.raises(KeyboardInterrupt):
        run(KeyboardInterrupt())


def test_a_finished_block_is_kept_when_the_run_is_stopped() -> None:
    go, written = threading.Event(), []

    def write() -> None:
        assert go.wait(LONG)
        written.append(True)

    def run() -> None:
        with Outbox(Here()) as outbox:
            outbox.put("write", write)
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert written == [True]


# --- in a run

SMALL: dict[str, Any] = {"samples": 8, "seq_len": 48, "no_eval": True, "device": "cpu"}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"}


METHODS: dict[str, Any] = {
    "gptq": compress.GPTQ(bits=3, group_size=32),
    "rtn": compress.RTN(bits=4, group_size=32),
    "rescaled": passes.load("smoothquant")(),
    "bias": passes.load("equalize")(bias_correction="measured"),
    "survey": passes.load("int8")(rule="paper", threshold=2.0),
}


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_used_before_it_is_there(
    toy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, tier: str
) -> None:
    """Copies that come as late as they may change no byte, wherever hidden states are kept."""
    text = tmp_path / "short.txt"
    text.write_text(text_file.read_text()[:4000])
    more = SMALL | {"calib": str(text_file), "no_eval": False, "eval": str(text)}
    for module in (flows, states):
        monkeypatch.setattr(module, "batch_rows", lambda *given: 3)
    compress.run(toy, METHODS[method], tmp_path / "a" / "out", **more)
    for module in (pipeline, hidden, states):
        monkeypatch.setattr(module, "lane_to", lambda device: Late())
    monkeypatch.setattr(hidden, "choose_tier", lambda *given: tier)
    compress.run(toy, METHODS[method], tmp_path / "b" / "out", **more)
    assert files(tmp_path / "a" / "out") == files(tmp_path / "b" / "out")


class Blocks:
    """An event for each of the toy's four blocks."""

    def __init__(self) -> None:
        self._events = [threading.Event() for _ in range(4)]

    def reached(self, block: int) -> None:
        self._events[block].set()

    def wait_for(self, block: int) -> None:
        assert block == len(self._events) or self._events[block].wait(LONG), f"block {block} never came"


def test_a_run_reads_and_writes_beside_its_solver(
    toy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The solver waits until the next block has been read, the writer until the next block is being solved: in one
    thread after another, neither would come."""
    read, solved = Blocks(), Blocks()
    reading, solving, writing = Checkpoint.read, pipeline.compress_block, journal.Journal.store

    def slow_read(self: Checkpoint, name: str, *rest: Any) -> Tensor:
        found = reading(self, name, *rest)
        if name.endswith("up_proj.weight"):
            read.reached(int(name.split(".")[2]))
        return found

    def slow_solve(model: Any, plan: Any, block: int, *rest: Any) -> Any:
        solved.reached(block)
        read.wait_for(block + 1)
        return solving(model, plan, block, *rest)

    def slow_store(self: journal.Journal, block: int, tensors: dict[str, Tensor]) -> str:
        solved.wait_for(block + 1)
        return writing(self, block, tensors)

    monkeypatch.setattr(Checkpoint, "read", slow_read)
    monkeypatch.setattr(pipeline, "compress_block", slow_solve)
    monkeypatch.setattr(journal.Journal, "store", slow_store)
    result = compress.run(toy, compress.GPTQ(bits=4), tmp_path / "out", calib=str(text_file), **SMALL)
    assert len(result.records) == 28
    assert {"read", "digest", "write"} <= result.beside.keys()


def test_a_damaged_tensor_is_named_at_its_block(toy: Path, text_file: Path, tmp_path: Path) -> None:
    """Read ahead or not: three blocks are finished, the fourth is not, and the tensor is named."""
    folder = shutil.copytree(toy, tmp_path / "toy")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.3.self_attn.v_proj.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompressError, match=f"{name}: 1 of its .* values are NaN or infinite"):
        compress.run(folder, compress.GPTQ(bits=4), tmp_path / "out", calib=str(text_file), **SMALL)
    assert len(list((tmp_path / "out.partial").glob("block-*.json"))) == 3


class Looks(TorchDispatchMode):
    """Counts how often a tensor's value is asked for, which on a GPU waits for all that is queued."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_device_is_asked_once_for_many_tensors(toy: Path, tmp_path: Path) -> None:
    """However many tensors a block has and however many batches go through it."""
    model = BlockModel(Weights(Checkpoint.open(toy)), torch.float32, CPU)
    flow = hidden.Activations(model, torch.randint(0, 300, (12, 16)), 2, tmp_path / "spill")
    flow.enter()
    with Looks() as load:
        model.load(0)
    with Looks() as forward:
        flow.advance(0)
    with Looks() as statistics:
        stats.collect(model, 0, model.linears(0), flow, Needs(hessian=True, ranges=True))
    # a list of flags is read whole, which is none of these looks at one value
    assert (load.count, forward.count, statistics.count) == (0, 1, 0)


def test_in_order_works_at_once_and_answers_in_order() -> None:
    """Each waits for its neighbour; the last raises when its turn comes."""
    gone = [threading.Event() for _ in range(4)]

    def work(i: int) -> int:
        gone[i].set()
        assert gone[i + 1 - 2 * (i % 2)].wait(LONG)
        if i == 3:
            raise ValueError("the third")
        return 10 * i

    before = torch.get_num_threads()
    if (os.cpu_count() or 1) > 1:
        found = in_order(work, range(4))
        assert [next(found) for _ in range(3)] == [0, 10, 20]
        with pytest.raises(ValueError, match="the third"):
            next(found)
    assert list(in_order(lambda i: i, range(20), each=1 << 60)) == list(range(20))
    assert torch.get_num_threads() == before
    with Thread() as there:
        assert there.submit(torch.get_num_threads).result() == before


def test_what_is_begun_stops_with_its_context() -> None:
    with Begun(lambda stop: stop.wait(LONG)) as begun, pytest.raises(KeyError):
        raise KeyError
    with Begun(lambda stop: stop.wait(LONG)) as begun:
        pass
    assert begun.result() is True
    with Begun(lambda stop: 5) as quick:
        assert quick.result() == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_all_finite(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 1001).to(dtype)
    assert all_finite(x)
    assert all_finite(x[:0])
    for bad in (float("nan"), float("inf"), float("-inf")) if dtype.itemsize > 1 else (float("nan"),):
        for place in (0, 500, 1000):
            y = x.clone()
            y[place] = bad
            assert not all_finite(y)
