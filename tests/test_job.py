"""The clock: parts add up, nothing waits for a device before the seconds are asked for."""

from __future__ import annotations

import time

import pytest
import torch

from compress.job import Clock


class Device:
    """A queue of work with a time of its own: events in it are over when the device has come so far."""

    def __init__(self) -> None:
        self.queued = self.reached = 0.0
        self.waits = 0

    def work(self, seconds: float) -> None:
        self.queued += seconds

    def event(self) -> Event:
        return Event(self, self.queued)


class Event:
    """As torch.cuda.Event."""

    def __init__(self, device: Device, at: float) -> None:
        self._device, self.at = device, at

    def query(self) -> bool:
        return self._device.reached >= self.at

    def synchronize(self) -> None:
        self._device.waits += 1
        self._device.reached = max(self._device.reached, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert end.query()
        return 1e3 * (end.at - self.at)


def test_seconds_are_those_of_the_device() -> None:
    """The host runs ahead of it, and does not wait until it wants to know."""
    device = Device()
    clock = Clock(torch.device("cuda"), device.event)
    for _ in range(3):
        with clock("forward"):
            device.work(1.0)
            with clock("hessian"):
                device.work(0.25)
            device.work(2.0)
        device.work(10.0)  # in no part
        with clock("solve"):
            device.work(4.0)
    assert device.waits == 0
    assert clock.seconds == pytest.approx({"forward": 9.0, "hessian": 0.75, "solve": 12.0})
    assert device.waits > 0
    with clock("solve"):
        device.work(1.0)
    assert clock.seconds["solve"] == pytest.approx(13.0)


def test_what_is_over_is_not_kept() -> None:
    device = Device()
    clock = Clock(torch.device("cuda"), device.event)
    for _ in range(100):
        with clock("solve"):
            device.work(1.0)
        device.reached = device.queued
    assert len(clock._spans) <= 1


def test_a_part_that_fails_is_counted() -> None:
    device = Device()
    clock = Clock(torch.device("cuda"), device.event)

    def fails() -> None:
        with clock("load"), clock("hessian"):
            device.work(2.0)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    with clock("solve"):
        device.work(1.0)
    assert clock.seconds == pytest.approx({"load": 0.0, "hessian": 2.0, "solve": 1.0})


def test_seconds_of_this_process() -> None:
    clock = Clock()
    begun = time.perf_counter()
    with clock("forward"):
        time.sleep(0.02)
        with clock("hessian"):
            time.sleep(0.03)
    took = time.perf_counter() - begun
    assert sum(clock.seconds.values()) == pytest.approx(took, abs=0.01)
    assert clock.seconds["forward"] >= 0.02
    assert clock.seconds["hessian"] >= 0.03


def test_threads_are_counted_apart() -> None:
    clock = Clock()
    with clock("solve"), clock.beside("read"):
        pass
    assert clock.seconds.keys() == {"solve"}
    assert clock.seconds_beside.keys() == {"read"}
