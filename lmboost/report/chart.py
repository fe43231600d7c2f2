"""Charts of the report's page: lines in an inline SVG, with HTML around them that keeps its size where they shrink."""

import dataclasses
import html
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from lmboost.run.progress import short

_SIZE = 1000  # of the SVG's own coordinates, which are stretched to the chart's size
COLOURS = 7  # that style.py has; the first is the baseline's
_DASHES = ("", "8 4", "2 4", "8 4 2 4")  # pixels


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
      name: as it is shown.
      colour: a number below COLOURS.
      dashes: a number for its dashes; 0 is none.
      x, y: NaN where there is no point; the line has a gap there.
      dots: whether its points are shown, each with its numbers.
    """

    name: str
    colour: int
    x: np.ndarray
    y: np.ndarray
    dashes: int = 0
    dots: bool = False

    @property
    def look(self) -> str:
        """Attributes of its path."""
        dashes = _DASHES[self.dashes % len(_DASHES)]
        return f'class="line c{self.colour}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def chart(
    caption: str,
    lines: Sequence[Line],
    x_label: str,
    limits: tuple[float, float] | None = None,
    level: float | None = None,
    ends: Sequence[tuple[float, str]] = (),
    told: Callable[[float], str] = short,
) -> str:
    """A figure of lines.

    Args:
      caption: above it, with the unit of y.
      limits: of y; None is from 0, or the lowest number, to the highest.
      level: where a dashed line goes across.
      ends: (x, what) of vertical lines.
      told: how x is written.
    """
    right = max((float(np.nanmax(line.x)) for line in lines), default=0.0) or 1.0
    low, high = limits or _extent(lines)
    place_x, place_y = lambda x: x / right * _SIZE, lambda y: (high - y) / (high - low) * _SIZE
    x_ticks, y_ticks = _ticks(0.0, right, 5), _ticks(low, high, 5)
    shapes = [f'<path class="grid" d="M0 {place_y(y):.1f}H{_SIZE}"/>' for y in y_ticks]
    if level is not None:
        shapes.append(f'<path class="level" d="M0 {place_y(level):.1f}H{_SIZE}"/>')
    for x, what in ends:
        shapes.append(f'<path class="end" d="M{place_x(x):.1f} 0V{_SIZE}"><title>{html.escape(what)}</title></path>')
    for line in lines[::-1]:  # the first one above the others
        shapes += _drawn(line, place_x, place_y, told)
    y_texts = [f'<span style="top:{place_y(y) / _SIZE:.2%}">{y:.4g}</span>' for y in y_ticks]
    x_texts = [f'<span style="left:{x / right:.2%}">{told(x)}</span>' for x in x_ticks]
    named = f'aria-label="{html.escape(caption)}"'
    return (
        f"<figure><figcaption>{html.escape(caption)}</figcaption>"
        f'<div class="chart"><div class="y">{"".join(y_texts)}</div>'
        f'<svg role="img" {named} viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none">{"".join(shapes)}</svg>'
        f'<div class="x">{"".join(x_texts)}</div><div class="label">{html.escape(x_label)}</div></div></figure>'
    )


def legend(lines: Sequence[Line]) -> str:
    """Which line is whose."""
    items = [
        f'<li><svg viewBox="0 0 24 8"><path {line.look} d="M0 4H24"/></svg>{html.escape(line.name)}</li>'
        for line in lines
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def bars(rows: Sequence[tuple[str, Sequence[float]]], kinds: Sequence[str]) -> str:
    """Shares of a whole (name, one number for each kind) as bars, and what their colours are."""
    drawn, there = [], [i for i in range(len(kinds)) if any(shares[i] >= 0.0005 for _, shares in rows)]
    for name, shares in rows:
        titles = [html.escape(f"{kind}: {share:.1%}") for kind, share in zip(kinds, shares, strict=True)]
        parts = [f'<i class="k{i}" style="flex-grow:{shares[i]:.4f}" title="{titles[i]}"></i>' for i in there]
        drawn.append(f"<dt>{html.escape(name)}</dt><dd>{''.join(parts)}</dd>")
    items = [f'<li><i class="k{i}"></i>{html.escape(kinds[i])}</li>' for i in there]
    return f'<ul class="legend">{"".join(items)}</ul><dl class="bars">{"".join(drawn)}</dl>'


def _drawn(line: Line, place_x, place_y, told: Callable[[float], str]) -> list[str]:
    there = np.isfinite(line.x) & np.isfinite(line.y)
    path, pen = [], "M"
    for x, y, known in zip(line.x, line.y, there, strict=True):
        if known:
            path.append(f"{pen}{place_x(x):.1f} {min(max(place_y(y), -_SIZE), 2 * _SIZE):.1f}")
        pen = "L" if known else "M"
    shapes = [f'<path {line.look} d="{"".join(path)}"/>']
    if line.dots or there.sum() == 1:
        shapes += [
            f'<path class="dot c{line.colour}" d="M{place_x(x):.1f} {place_y(y):.1f}h0"><title>'
            f"{html.escape(line.name)}: {y:.4f} at {told(x)}</title></path>"
            for x, y in zip(line.x[there], line.y[there], strict=True)
        ]
    return shapes


def _extent(lines: Sequence[Line]) -> tuple[float, float]:
    known = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    low, high = min(float(known.min()), 0.0), float(known.max())
    return low, high + 0.06 * (high - low or 1.0)


def _ticks(low: float, high: float, count: int) -> list[float]:
    values = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(value) for value in values if low <= value <= high]
