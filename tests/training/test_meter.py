"""The line that a run says of itself, at the times of a clock that the test turns."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from harken.training.meter import Meter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def meter(
    clock: Clock, n_steps: int = 100, first: int = 0, flops: float | None = None, peak: float | None = None
) -> Meter:
    return Meter("toy", n_steps, first, flops, peak, clock)


def test_clips_a_second_and_the_time_left(clock: Clock) -> None:
    m = meter(clock)
    for _ in range(10):
        clock.now += 2
        m.did(64)
    assert m.speed() == "32 clips/s, waiting 0.0 %, 3 min left"  # 90 steps at 2 s
    for _ in range(50):
        clock.now += 200
        m.did(64)
    assert m.speed().startswith("0.38 clips/s, ")


@pytest.mark.parametrize(
    ("clips", "seconds", "says"),
    [
        (5, 1, "5 clips/s"),
        (99, 10, "9.9 clips/s"),
        (100, 10, "10 clips/s"),
        (123_456, 1, "123,456 clips/s"),
        (1, 3, "0.33 clips/s"),
    ],
)
def test_few_and_many_clips_a_second(clock: Clock, clips: int, seconds: float, says: str) -> None:
    m = meter(clock)
    clock.now += seconds
    m.did(clips)
    assert m.speed().split(", waiting")[0] == says


def test_the_share_of_the_peak(clock: Clock) -> None:
    m = meter(clock, flops=2e9, peak=1e12)
    clock.now += 10
    m.did(1000)  # 100 a second of 500 that the peak would allow
    assert m.speed() == "100 clips/s, MFU 20 %, waiting 0.0 %, 16 min left"
    for flops, peak in ((None, 1e12), (2e9, None)):
        unknown = meter(clock, flops=flops, peak=peak)
        clock.now += 10
        unknown.did(1000)
        assert "MFU" not in unknown.speed()


def batches(clock: Clock, *waits: float) -> Iterator[int]:
    for n, seconds in enumerate(waits):
        clock.now += seconds
        yield n


def test_the_share_of_time_spent_waiting_for_data(clock: Clock) -> None:
    m, seen = meter(clock, n_steps=3), []
    for batch in m.waiting(batches(clock, 1.0, 0.0, 0.5)):
        clock.now += 0.5  # the step
        m.did(2)
        seen.append(batch)
    assert seen == [0, 1, 2]
    assert m.speed() == "2 clips/s, waiting 50.0 %"  # of 3 seconds; nothing is left


def test_an_error_of_the_data_comes_through(clock: Clock) -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("the disk")

    coming = meter(clock).waiting(failing())
    assert next(coming) == 1
    with pytest.raises(ValueError, match="the disk"):
        next(coming)


def test_validation_is_no_training_but_takes_time(clock: Clock) -> None:
    """After `rest` the speed is the new stretch's; the time left counts what lay between."""
    m = meter(clock, n_steps=20)
    for _ in m.waiting(batches(clock, 1.0, 1.0)):
        m.did(10)
    clock.now += 98  # validation
    m.rest()
    assert m.speed() == "0 clips/s, waiting 0.0 %, 15 min left"  # 18 steps at 50 s, all counted
    clock.now += 1
    m.did(10)
    assert m.speed().startswith("10 clips/s, waiting 0.0 %, ")


def test_before_the_first_step_and_after_the_last_nothing_is_left(clock: Clock) -> None:
    m = meter(clock, n_steps=2)
    assert m.speed() == "0 clips/s, waiting 0.0 %"
    clock.now += 60
    m.did(1)
    assert m.speed().endswith("1 min left")
    clock.now += 60
    m.did(1)
    assert m.speed() == "0.017 clips/s, waiting 0.0 %"


def test_a_resumed_run_judges_by_its_own_steps(clock: Clock) -> None:
    m = meter(clock, n_steps=100, first=90)
    assert (m.step, m.speed()) == (90, "0 clips/s, waiting 0.0 %")
    clock.now += 10
    m.did(10)
    assert m.speed() == "1 clips/s, waiting 0.0 %, 2 min left"  # 9 steps at 10 s
    done = meter(clock, n_steps=100, first=100)
    assert done.speed() == "0 clips/s, waiting 0.0 %"


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (0.4, "0 s"),
        (29, "29 s"),
        (31, "1 min"),
        (89, "1 min"),
        (91, "2 min"),
        (59.4 * 60, "59 min"),
        (59.6 * 60, "1 h 0 min"),
        (60 * 60, "1 h 0 min"),
        (119.7 * 60, "2 h 0 min"),
        (49.25 * 3600, "49 h 15 min"),
    ],
)
def test_the_time_left_in_words(clock: Clock, seconds: float, says: str) -> None:
    m = meter(clock, n_steps=2)
    clock.now += seconds
    m.did(1)
    assert m.speed().split(", ")[-1] == f"{says} left"


def test_long_epochs_speak_now_and_then(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "harken")
    monkeypatch.delenv("CI", raising=False)
    m = meter(clock)
    for _ in range(8):
        clock.now += 9
        m.did(9)
    assert [r.getMessage() for r in caplog.records] == [
        "toy: step 4 of 100, 1 clips/s, waiting 0.0 %, 14 min left",
        "toy: step 8 of 100, 1 clips/s, waiting 0.0 %, 14 min left",
    ]
    caplog.clear()
    monkeypatch.setenv("CI", "true")
    for _ in range(8):
        clock.now += 9
        m.did(9)
    assert not caplog.records


def test_the_clock_is_the_machine_s_steady_one() -> None:
    assert Meter("toy", 1, 0).speed() == "0 clips/s, waiting 0.0 %"
