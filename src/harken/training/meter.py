"""How fast a run trains: clips per second, the share of what the device can do, the share of time spent waiting."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

log = logging.getLogger("harken")
Item = TypeVar("Item")
LOG_EVERY_S = 30.0


class Meter:
    """Counts what a run's loop does and says it in one line: at every epoch's end, and now and then within long ones.

    `flops` are the operations that training needs for a clip and `peak` those that the devices can do in a second; MFU,
    their quotient at the measured speed (Chowdhery et al. 2022), is left out where either is not known.
    """

    def __init__(
        self,
        name: str,
        n_steps: int,
        first_step: int,
        flops: float | None = None,
        peak: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.n_steps, self.step = name, n_steps, first_step
        self.flops, self.peak, self.clock = flops, peak, clock
        self._first, self._began, self._said = first_step, clock(), clock()
        self._n_clips, self._waited, self._stretch = 0, 0.0, clock()

    def waiting(self, batches: Iterable[Item]) -> Iterator[Item]:
        """`batches`, and how long each was waited for."""
        coming = iter(batches)
        while True:
            began = self.clock()
            try:
                batch = next(coming)
            except StopIteration:
                return
            self._waited += self.clock() - began
            yield batch

    def did(self, n_clips: int) -> None:
        """A step on so many clips was done; says so now and then."""
        self.step += 1
        self._n_clips += n_clips
        if self.clock() - self._said > LOG_EVERY_S and not os.environ.get("CI"):
            log.info("%s: step %d of %d, %s", self.name, self.step, self.n_steps, self.speed())
            self._said = self.clock()

    def speed(self) -> str:
        """Clips a second since the last `rest`, MFU, the share of time spent waiting for data, and the time left."""
        seconds = max(self.clock() - self._stretch, 1e-9)
        rate = self._n_clips / seconds
        told = [f"{rate:,.0f} clips/s" if rate >= 10 else f"{rate:.2g} clips/s"]
        if self.flops and self.peak:
            told.append(f"MFU {100 * rate * self.flops / self.peak:.0f} %")
        told.append(f"waiting {100 * self._waited / seconds:.1f} %")
        done = self.step - self._first
        if done and self.step < self.n_steps:
            left = (self.clock() - self._began) / done * (self.n_steps - self.step)
            told.append(f"{_duration(left)} left")
        return ", ".join(told)

    def rest(self) -> None:
        """What comes next is not training, or is another epoch's: count anew."""
        self._n_clips, self._waited, self._stretch = 0, 0.0, self.clock()


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
