"""Goodput: every second is booked once, over kills and restarts, and writing it down neither costs nor ends a run."""

import json
import os
import subprocess
import sys
import time

import pytest

from lmboost.errors import UserError
from lmboost.run import goodput


class Time:
    """A clock that goes only when told."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def go(self, seconds):
        self.now += seconds


def begun(directory, now=time.time):
    """The clock of an attempt whose loop begins at once, with step 0."""
    clock = goodput.Clock(str(directory), clock=now)
    clock.begin(0)
    return clock


def test_inner_time_is_not_counted_twice_and_kinds_add_up_to_the_wall_clock(tmp_path):
    now = Time()
    clock = goodput.Clock(str(tmp_path / "run"), started=990.0, clock=now)
    now.go(5)
    with clock.measure("restore"):
        now.go(7)
    now.go(1)
    clock.begin(0)
    with clock.measure("compile"):
        now.go(20)
    now.go(100)
    with clock.measure("evaluate"):
        now.go(3)
        with clock.measure("compile"):
            now.go(4)
            with clock.measure("data"):
                now.go(0.5)
        now.go(2)
    with pytest.raises(ZeroDivisionError), clock.measure("save"):
        now.go(6)
        1 / 0  # noqa: B018
    now.go(50)
    assert clock.share == pytest.approx(150 / 208.5)
    clock.write(8)
    found = goodput.read(str(tmp_path / "run"))
    assert found.attempts == 1 and found.wall == pytest.approx(208.5)
    assert found.seconds == pytest.approx(
        {"start": 16, "restore": 7, "compile": 24, "data": 0.5, "step": 150, "evaluate": 5, "save": 6}
        | {"lost": 0, "restarting": 0}
    )
    assert sum(found.seconds.values()) == pytest.approx(found.wall) and found.share("step") == pytest.approx(
        clock.share
    )


def test_waiting_beside_busy_devices_is_a_step(tmp_path):
    now = Time()
    clock = begun(tmp_path, now)
    for busy in (True, False):
        with clock.measure("data", busy=lambda busy=busy: busy):
            now.go(2)
            with clock.measure("compile"):
                now.go(1)
            now.go(2)
    clock.write(1)
    seconds = goodput.read(str(tmp_path)).seconds
    # Once something else was measured inside, what came before it is booked.
    assert seconds["step"] == 2 and seconds["compile"] == 2 and seconds["data"] == 6


def test_lines_are_at_least_so_far_apart(tmp_path):
    now = Time()
    clock = begun(tmp_path, now)
    for step in range(100):
        now.go(7)
        clock.write(step, at_least=60)
    lines = [json.loads(line) for line in (tmp_path / goodput.FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, *range(8, 100, 9)]
    assert lines[1]["seconds"]["step"] == 63 and lines[-1]["seconds"]["step"] == 7 * (lines[-1]["step"] + 1)


def attempt(directory, now, start_step, stop_step, step_seconds=1.0, write_every=10):
    """Starts in 5 seconds, compiles in 10, then steps."""
    clock = goodput.Clock(str(directory), started=now.now, clock=now)
    now.go(5)
    clock.begin(start_step)
    with clock.measure("compile"):
        now.go(10)
    for step in range(start_step, stop_step):
        now.go(step_seconds)
        if (step + 1) % write_every == 0:
            clock.write(step + 1)


def test_steps_lost_in_a_crash_and_the_gaps_between_attempts(tmp_path):
    now = Time()
    attempt(tmp_path, now, 0, 39, 2.0)  # its last line is of step 30
    now.go(82)
    attempt(tmp_path, now, 20, 30)
    now.go(30)
    attempt(tmp_path, now, 30, 50)
    found = goodput.read(str(tmp_path))
    assert found.attempts == 3 and found.wall == now.now - 1000
    assert found.seconds == pytest.approx(
        {"start": 15, "compile": 30, "step": 20 * 2 + 10 + 20, "lost": 10 * 2, "restarting": 9 * 2 + 82 + 30}
        | dict.fromkeys(("restore", "data", "evaluate", "save"), 0)
    )


def test_steps_that_several_attempts_trained_in_vain(tmp_path):
    now = Time()
    attempt(tmp_path, now, 0, 30)
    attempt(tmp_path, now, 20, 40)
    attempt(tmp_path, now, 5, 30)  # the checkpoints of steps 10 to 40 were damaged
    found = goodput.read(str(tmp_path))
    assert found.seconds["lost"] == pytest.approx(25 + 20) and found.seconds["step"] == pytest.approx(5 + 25)


def test_a_lost_part_between_two_lines_is_its_share_of_them(tmp_path):
    now = Time()
    attempt(tmp_path, now, 0, 20, 1.0)
    attempt(tmp_path, now, 14, 20)
    assert goodput.read(str(tmp_path)).seconds["lost"] == pytest.approx(6)


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_half_written_lines_of_killed_attempts(tmp_path, cut):
    now, path = Time(), tmp_path / goodput.FILE
    attempt(tmp_path, now, 0, 20)
    path.write_bytes(path.read_bytes()[:-cut])
    torn = goodput.read(str(tmp_path))
    assert torn.attempts == 1 and torn.seconds["step"] == (20 if cut == 1 else 10), "up to the last whole line"
    attempt(tmp_path, now, 10, 20)
    found = goodput.read(str(tmp_path))
    assert found.attempts == 2 and found.seconds["step"] == 20, "the next attempt's first line is one of its own"
    assert sum(found.seconds.values()) == pytest.approx(found.wall) == 60
    assert found.seconds["lost" if cut == 1 else "restarting"] == 10


def test_runs_without_a_whole_line(tmp_path):
    assert goodput.read(str(tmp_path)) is None
    (tmp_path / goodput.FILE).write_text('{"attempt": 1')
    assert goodput.read(str(tmp_path)) is None
    (tmp_path / goodput.FILE).write_text('\n{"step": 3}\n')
    with pytest.raises(UserError, match="goodput.jsonl, line 2, is not one that training writes"):
        goodput.read(str(tmp_path))


def test_a_full_disk_is_said_once_and_does_not_end_the_run(tmp_path, capsys):
    now = Time()
    clock = begun(tmp_path, now)
    disk, clock._lines._file = clock._lines._file, open("/dev/full", "ab", buffering=0)
    for step in (1, 2):
        now.go(3)
        clock.write(step)
    assert capsys.readouterr().err.count("No space left on device") == 1
    clock._lines._file = disk
    now.go(3)
    clock.write(3)
    assert [line["step"] for line in map(json.loads, open(tmp_path / goodput.FILE))] == [0, 1, 2, 3]
    assert goodput.read(str(tmp_path)).seconds["step"] == 9


def test_a_file_that_cannot_be_opened_is_said_and_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / goodput.FILE).mkdir()
    clock = begun(tmp_path)
    clock.write(1)
    clock.close()
    assert capsys.readouterr().err.count("goodput.jsonl cannot be written (Is a directory): the run goes on") == 1


def test_a_clock_that_is_set_back_takes_no_time_away(tmp_path):
    now = Time()
    clock = begun(tmp_path, now)
    now.go(10)
    with clock.measure("save"):
        now.go(-5)
    clock.write(1)
    seconds = goodput.read(str(tmp_path)).seconds
    assert seconds["step"] == 10 and seconds["save"] == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc")
def test_the_start_of_the_process_is_known(tmp_path):
    before = time.time()
    program = "import time; time.sleep(3); from lmboost.run import goodput; print(goodput.process_start(), time.time())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    started, now = map(float, result.stdout.split())
    assert abs(started - before) < 2 and now - started > 3, "importing is part of it"


def test_booking_a_step_costs_microseconds(tmp_path):
    clock = begun(tmp_path)
    begin = time.process_time()
    for step in range(10_000):
        with clock.measure("data"):
            pass
        clock.write(step, at_least=60)
    assert time.process_time() - begin < 1.0, "less than 100 microseconds a step"
