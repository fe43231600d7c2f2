"""The console of a run: a progress bar, or a line now and then."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import rich.console
import rich.progress
import rich.text

from lmboost.objective import terms


class Progress:
    """The console: a progress bar on a terminal, else a plain line every 10 seconds and at evaluations.

    Of several processes only the first one prints.

    Args:
      total_steps, start_step: of the run, and where it goes on from.
      console, clock: for tests.
    """

    INTERVAL = 10.0  # seconds between plain lines

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._clock = total_steps, clock
        self._quiet = jax.process_index() != 0
        self._console = console or rich.console.Console(file=sys.stdout, highlight=False)
        self._first: tuple[int, float] | None = None  # step and time of the first update, after compilation
        self._printed = -math.inf
        self._bar = None
        if self._console.is_terminal and not self._quiet:
            columns = (
                rich.progress.TextColumn("[bold]{task.completed}[/]/{task.total}"),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.TextColumn("{task.percentage:>3.0f}%"),
                rich.progress.TextColumn("{task.fields[text]}", markup=False),
            )
            self._bar = rich.progress.Progress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, text="compiling")
            self._bar.start()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows the numbers of a training step, `step` of them being done."""
        now = self._clock()
        self._first = self._first or (step, now)
        text = "  ".join(filter(None, [_terms(values), self._eta(step, now)]))
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif now - self._printed >= self.INTERVAL or step >= self._total:
            self._printed = now
            self._line(step, text)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Prints the numbers of an evaluation, which stay on the console."""
        self._line(step, _terms(values))

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar:
            self._bar.stop()
        self._bar = None

    def _line(self, step: int, text: str) -> None:
        if not self._quiet:
            self._console.print(rich.text.Text(f"step {step}/{self._total}  {text}"), soft_wrap=True)

    def _eta(self, step: int, now: float) -> str:
        first, since = self._first
        if step <= first:
            return ""
        left = round((now - since) / (step - first) * max(self._total - step, 0))
        return f"eta {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"


_SHOWN = {  # in this order; the rest is for the files
    "loss": "{:.3f}",
    "ce": "{:.3f}",
    **dict.fromkeys(terms.MAIN_METRICS, "{:.3f}"),
    "grad_norm": "{:.2f}",
    "learning_rate": "{:.2e}",
    "val_loss": "{:.4f}",
    "val_perplexity": "{:.3f}",
    "val_bits_per_byte": "{:.4f}",
}
_LABELS = {"grad_norm": "grad", "learning_rate": "lr"}


def _terms(values: Mapping[str, Any]) -> str:
    """The numbers worth a glance, in a fixed order."""
    parts = [f"{_LABELS.get(k, k)} {form.format(values[k])}" for k, form in _SHOWN.items() if values.get(k) is not None]
    if values.get("skipped"):
        parts.append(f"skipped {values['skipped']:.0f}")
    if values.get("tokens_per_second") is not None:
        parts.append(f"{short(values['tokens_per_second'])} tokens/s")
    if values.get("mfu") is not None:
        parts.append(f"MFU {values['mfu']:.1%}")
    parts += [f"{k.removeprefix('task/')} {v:.4f}" for k, v in values.items() if k.startswith("task/")]
    return "  ".join(parts)


def short(value: float) -> str:
    """A number in three digits and a letter for its thousands, millions, billions or trillions: 1.23M."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"
