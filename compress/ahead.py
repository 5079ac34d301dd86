"""What runs beside the block loop: the next block is read ahead, the finished one is hashed and written behind.

    Reader     threads      a block's tensors, read and copied to the device while the block before is worked on
    Outbox     threads      packed tensors copied to the host, hashed and written while the blocks after are worked on
    Begun      one thread   something that is not needed before the first block is written
    in_order   threads      the same work on one thing after another, such as reading layers back

The first holds one block at most, the second as many as it writes at once. Copies run on a lane (lane.py).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from compress.lane import Lane, Mark

S = TypeVar("S")
T = TypeVar("T")
#: counts the seconds that a thread spends on a part of the run
Timed = Callable[[str], AbstractContextManager[None]]


def untimed(part: str) -> AbstractContextManager[None]:
    """Counts nothing."""
    return nullcontext()


def hands() -> int:
    """Threads that read at once: one reads a file in memory slower than a GPU takes it, but cores have other work."""
    return max(1, min(4, (os.cpu_count() or 1) // 4))


class Reader:
    """The stored tensors of one block after another, each read by threads while the block before it is worked on.

    Args:
        names: for each block, in the order in which they will be taken, the tensors that it is made of.
        read: a tensor by its name, in memory that the second argument makes; what it raises, `take` raises.
        lane: where they wait: on the device, or on the host (`Here`).
        timed: counts the seconds of the thread as "read".

    Attributes:
        late: blocks of which something had no room where it was to wait.
    """

    def __init__(
        self,
        names: Iterable[tuple[int, list[str]]],
        read: Callable[[str, Callable[[int], Tensor]], Tensor],
        lane: Lane,
        timed: Timed = untimed,
    ) -> None:
        self._names = deque(names)
        self._read, self._lane, self._timed = read, lane, timed
        self.late = 0
        self._next: tuple[int, Future[tuple[dict[str, Tensor], Mark]]] | None = None
        self._stopped = threading.Event()
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._hands = ThreadPoolExecutor(hands(), "read-ahead-hands")
        self._begin()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._hands.shutdown(wait=True, cancel_futures=True)
        self._next = None

    def _begin(self) -> None:
        self._next = None
        if self._names:
            block, names = self._names.popleft()
            self._next = (block, self._thread.submit(self._fetch, names))

    def _fetch(self, names: list[str]) -> tuple[dict[str, Tensor], Mark]:
        found: dict[str, Tensor] = {}
        coming: deque[tuple[str, Future[Tensor]]] = deque()
        most = hands()

        def arrived() -> None:
            name, tensor = coming.popleft()
            found[name] = self._lane.up(tensor.result())

        with self._timed("read"):
            for name in names:
                if self._stopped.is_set():
                    break
                coming.append((name, self._hands.submit(self._read, name, self._lane.empty)))
                if len(coming) == most:
                    arrived()
            while coming:
                arrived()
        return found, self._lane.mark()

    def take(self, block: int) -> dict[str, Tensor]:
        """The tensors of a block, the next in order; from here on the one after it is read."""
        assert self._next is not None
        expected, coming = self._next
        assert block == expected, f"block {block} was asked for, {expected} is next"
        found, mark = coming.result()
        del coming
        self.late += any(value.device.type != self._lane.device.type for value in found.values())
        self._begin()
        self._lane.arrive(found.values(), mark)
        return found


class Outbox:
    """What is finished, on its way to the disk: copied to the host, worked on there and written by threads, in order.

    Args:
        lane: from the device.
        timed: counts the seconds of the threads.
        together: tasks at a time, each with its block on the host. A file's sha256 is the work of one core, about 1 GB
            a second: where blocks are finished quicker than that, two at a time.
    """

    def __init__(self, lane: Lane, timed: Timed = untimed, together: int = 1) -> None:
        self._lane, self._timed, self._together = lane, timed, together
        self._writers = ThreadPoolExecutor(together, "write-behind")
        self._helpers = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "write-behind-digest")
        self._writing: deque[Future[None]] = deque()

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.flush()  # a block that is finished is kept, whatever stops the run
        except Exception as failure:
            if error is None or isinstance(error, Exception):  # what failed in an earlier block is the cause of both
                raise failure from None
        finally:
            self._writers.shutdown(wait=True)
            self._helpers.shutdown(wait=True, cancel_futures=True)

    def host(self, value: Tensor) -> Tensor:
        """A tensor's copy on the host, filled by the time that a task given to `put` runs."""
        return self._lane.down(value)

    def later(self, part: str, work: Callable[[Tensor], T], value: Tensor) -> Future[T]:
        """What `work` makes of a tensor's copy on the host, in a thread; `part` names its seconds."""
        host = self._lane.down(value)
        mark = self._lane.mark()

        def run() -> T:
            mark.synchronize()
            with self._timed(part):
                return work(host)

        return self._helpers.submit(run)

    def put(self, part: str, task: Callable[[], T], then: Callable[[T], None] | None = None) -> None:
        """Run `task` in a thread, as soon as there is one for it.

        Args:
            part: names its seconds.
            then: gets what `task` made, once every earlier task and what followed it are done; not called where one of
                them failed.

        Raises:
            Exception: what an earlier task raised.
        """
        while len(self._writing) >= self._together:
            self._wait()
        self.check()
        mark = self._lane.mark()
        before = self._writing[-1] if self._writing else None

        def run() -> None:
            mark.synchronize()
            with self._timed(part):
                made = task()
            if before is not None and before.exception() is not None:  # which is told as its own
                return
            if then is not None:
                with self._timed(part):
                    then(made)

        self._writing.append(self._writers.submit(run))

    def check(self) -> None:
        """Raise what tasks raised that are done."""
        while self._writing and self._writing[0].done():
            self._wait()

    def flush(self) -> None:
        """Wait for every task. Raises what the first that failed raised."""
        failure: BaseException | None = None
        while self._writing:
            try:
                self._wait()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _wait(self) -> None:
        """Wait for the first task. Raises what it raised."""
        first = self._writing[0]
        first.exception()  # waits; where that is interrupted, the task is waited for again
        self._writing.popleft()
        first.result()


class Begun(Generic[T]):
    """Work that a thread has begun; when the context ends it is told to stop.

    Args:
        work: is given what tells it to stop.
        part: names its seconds.
    """

    def __init__(self, work: Callable[[threading.Event], T], timed: Timed = untimed, part: str = "") -> None:
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, part or "begun")

        def run() -> T:
            with timed(part):
                return work(self._stop)

        self._result = self._thread.submit(run)

    def __enter__(self) -> Begun[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.shutdown(wait=True)

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return self._result.done()

    def result(self) -> T:
        """Waits for it. Raises what it raised."""
        return self._result.result()


def threads_for(each: int, most: int = 16) -> int:
    """How many threads may do what takes `each` bytes of host memory at most: a quarter of what is free is used."""
    import psutil

    fit = psutil.virtual_memory().available // 4 // max(each, 1)
    return int(max(1, min(os.cpu_count() or 1, most, fit)))


def in_order(work: Callable[[S], T], things: Iterable[S], each: int = 0) -> Iterator[T]:
    """What `work` makes of each thing, in their order; what it raises for one is raised when that one's turn comes.

    Threads share out the processors, and torch's operators in each of them its own part.

    Args:
        each: see `threads_for`.
    """
    threads = threads_for(each)
    before = torch.get_num_threads()
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads, "in-order", partial(torch.set_num_threads, max(1, before // threads))) as pool:
        try:
            for thing in things:
                waiting.append(pool.submit(work, thing))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()
            torch.set_num_threads(before)  # what a thread sets holds for threads to come, too
