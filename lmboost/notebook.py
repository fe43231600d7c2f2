"""A run in a notebook, with its curves while it goes.

    from lmboost.notebook import train

    train("--config=configs/quickstart.py:helped", "--config.data.train=DATA", "--config.teacher.path=RUN",
          "--workdir=runs/helped", beside=["runs/plain"])

The run is a process of its own, the one that `python -m lmboost.train` starts: an accelerator belongs to one process,
and what works here works in a shell. The notebook reads the run's metrics.jsonl. Interrupting the cell saves the run,
and the same cell goes on with it.
"""

import io
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from lmboost.errors import EXIT_PREEMPTED, UserError
from lmboost.objective import auto
from lmboost.report.plot import BASELINE, COLOURS, INK
from lmboost.run import metrics

# What a run's lines say of how much help there is, and how the figure calls it.
HELP = {"kd_weight": "kd: weight", "align_weight": "align: weight", "lead": "lead of the teacher, nats"}


def train(*flags: str, beside: Sequence[str] = (), seconds: float = 2.0) -> None:
    """The train verb in a process of its own; its words and its curves are the cell's output.

    Args:
      flags: of `python -m lmboost.train`, one with --workdir among them.
      beside: workdirs of other runs, whose validation losses are drawn, too.
      seconds: between two drawings.

    Raises a UserError where there is no --workdir, no IPython, no notebook, and where the run did not finish.
    """
    try:
        from IPython import get_ipython
        from IPython.display import Image, display
    except ImportError as error:
        raise UserError('lmboost.notebook needs IPython: pip install "lmboost[notebook]".') from error
    if get_ipython() is None:
        raise UserError("lmboost.notebook.train draws into a notebook's cell; elsewhere take python -m lmboost.train.")
    workdir = next((flag.partition("=")[2] for flag in flags if flag.startswith("--workdir=")), "")
    if not workdir:
        raise UserError("--workdir is missing: give the directory that the run writes to.")

    def picture() -> Image:  # a figure itself is shown as a picture only where pyplot is set up for it
        figure([workdir, *beside]).savefig(file := io.BytesIO(), format="png", dpi=90)
        return Image(file.getvalue())

    shown, drawn = display(picture(), display_id=True), time.monotonic()
    # In a session of its own: an interrupt of the notebook reaches it once, and from here.
    process = subprocess.Popen(
        [sys.executable, "-m", "lmboost.train", *flags], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment(),
    )  # fmt: skip
    words: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_pass_on, args=(process, words), daemon=True).start()
    word: str | None = ""
    while word is not None:
        try:
            word = _next(words, seconds)
            print(word or "", end="")
            if word is None or time.monotonic() - drawn >= seconds:
                shown.update(picture())
                drawn = time.monotonic()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
    if (status := process.wait()) == EXIT_PREEMPTED:
        raise UserError(f"the run in {workdir} was stopped, and has saved: the same cell goes on with it.")
    if status:
        raise UserError(f"the run in {workdir} ended with status {status}: what it said of that stands above.")


def _environment() -> dict[str, str]:
    """That of a run whose words go into a cell: as they come, and without the bar that notebooks make programs draw."""
    kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
    return kept | {"PYTHONUNBUFFERED": "1"}


def _next(words: queue.Queue, seconds: float) -> str | None:
    """The next line; "" where none comes within so many seconds, None at the end."""
    try:
        return words.get(timeout=seconds)
    except queue.Empty:
        return ""


def _pass_on(process: subprocess.Popen, words: queue.Queue) -> None:
    """Puts what a process says into the queue, line by line, and None at its end."""
    for line in process.stdout:
        words.put(line)
    words.put(None)


def figure(workdirs: Sequence[str]) -> Figure:
    """Losses of runs against their steps; of the first one each step's, and how much help it has.

    A run that has written nothing yet has no curve.
    """
    runs = {workdir: _lines(workdir) for workdir in workdirs}
    first = runs[workdirs[0]]
    help_ = {name: words for name, words in HELP.items() if any(line.get(name) is not None for line in first)}
    drawn = Figure(figsize=(9, 3.4) if help_ else (6, 3.4), layout="constrained")
    left, *right = drawn.subplots(1, 2 if help_ else 1, squeeze=False)[0]
    left.plot(*_curve(first, "ce"), color=COLOURS[0], lw=0.8, alpha=0.4, label="in training")
    for i, (workdir, run) in enumerate(runs.items()):
        colour = COLOURS[0] if not i else (BASELINE, *COLOURS[1:])[(i - 1) % len(COLOURS)]
        name = os.path.basename(workdir.rstrip("/"))
        left.plot(*_curve(run, "val_loss"), "o-", ms=3, color=colour, label=name.replace("$", r"\$"))
    left.set(xlabel="steps", ylabel="loss, nats a token")
    left.legend(frameon=False)
    for axes in right:
        for (name, words), colour in zip(help_.items(), COLOURS[1:], strict=False):
            axes.plot(*_curve(first, name), color=colour, label=words)
        ended = [line[auto.ENDED] for line in first if line.get(auto.ENDED, auto.NEVER) != auto.NEVER]
        if ended:
            axes.axvline(ended[-1], color=BASELINE, lw=0.9, ls=(0, (4, 3)), label="help has ended")
        axes.set(xlabel="steps")
        axes.legend(frameon=False)
    for axes in drawn.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(color="#999999", labelcolor=INK)
    return drawn


def _lines(workdir: str) -> list[dict[str, Any]]:
    """What a run has written so far."""
    return list(metrics.read(workdir)) if os.path.exists(os.path.join(workdir, metrics.FILE)) else []


def _curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The steps at which a number was written, and the numbers."""
    there = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in there], [value for _, value in there]
