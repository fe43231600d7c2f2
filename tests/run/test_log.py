"""The parts of a run's loop: one statement tells watchdog, clock and log."""

import contextlib

import pytest

from lmboost.run import goodput, guard
from lmboost.run.log import Parts
from tests.run.test_goodput import Time


class Watch(guard.Watchdog):
    """A watchdog that never barks, and keeps what it was told."""

    def __init__(self):
        super().__init__(0)
        self.told = []

    def beat(self, what):
        super().beat(what)
        self.told.append(what)


class Log:
    """A log whose newest step takes four seconds more."""

    def __init__(self, now):
        self.now, self.paused = now, 0

    def pause(self):
        self.now.go(4)
        self.paused += 1


@pytest.fixture
def loop(tmp_path):
    """(clock's time, watchdog, log, part, seconds by kind)."""
    now = Time()
    watch, log, clock = Watch(), Log(now), goodput.Clock(str(tmp_path), clock=now)
    clock.begin(0)

    def seconds():
        clock.write(1)
        return {k: v for k, v in goodput.read(str(tmp_path)).seconds.items() if v}

    with contextlib.closing(clock):
        yield now, watch, log, Parts(watch, clock, log), seconds


def test_a_part_is_told_to_the_watchdog_and_booked_to_its_kind(loop):
    now, watch, log, part, seconds = loop
    with part("waiting for data", "data", busy=lambda: True):
        now.go(1)
    with part("working on step 0", "compile"):
        now.go(2)
        assert watch._what == "working on step 0"
    assert watch.told == ["waiting for data", "working on step 0"] and not log.paused
    assert seconds() == {"step": 1, "compile": 2}, "waiting beside busy devices is a step"


def test_the_newest_step_is_waited_for_before_a_part_that_pauses_the_log(loop):
    now, _, log, part, seconds = loop
    with pytest.raises(ZeroDivisionError), part("saving step 1", "save", pause=True):
        now.go(3)
        1 / 0  # noqa: B018
    assert log.paused == 1 and seconds() == {"step": 4, "save": 3}


def test_a_patient_part_is_not_watched(loop):
    now, watch, _, part, _ = loop
    with part("evaluating tasks", "evaluate", patient=True):
        assert watch._last == float("inf")
    assert watch._last < float("inf") and watch.told == ["evaluating tasks"] * 2
