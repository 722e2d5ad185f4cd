"""Small line charts as SVG that follows the page: its style sheet colours them, so light and dark both work.

Hand-made rather than drawn by a plotting library: a chart is a few kilobytes of text that wraps, scales and
recolours with the page, and its points are there for the page's script to read out under the pointer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

# User units of the drawing; the page scales it to its column.
_WIDTH, _HEIGHT = 360, 212
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 8, 10, 38
_MOST_POINTS = 240


@dataclass(frozen=True)
class Series:
    """One line: points (x[i], y[i]), x ascending. Points beyond 1e±30 are left out."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class _Axis:
    """A scale from values to user units, and its ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: list[float]

    def place(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    line: bool = True,
    cover: tuple[float, ...] = (),
) -> str:
    """Draw series in one frame.

    Args:
        series: at least one with at least one point. Long ones are thinned to the means of 240 equal runs.
        x_label, y_label: what the axes count; escaped.
        log: logarithmic y axis; values that are not positive are left out.
        line: join the points; otherwise each is a dot.
        cover: values the y axis reaches whatever the points are, e.g. (0, 1) for a share.

    Returns the text of an `<svg>` element. Raises ValueError when no point can be drawn.
    """
    drawn = [_thinned(s, log) for s in series]
    xs = [x for s in drawn for x in s.x]
    ys = [y for s in drawn for y in s.y]
    if not xs:
        raise ValueError("a chart needs at least one finite point")
    across = _axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, log=False, room=6, pad=0 if line else 0.03)
    up = _axis(min([*ys, *cover]), max([*ys, *cover]), _HEIGHT - _BOTTOM, _TOP, log=log, room=5, pad=0.06)
    svg = ElementTree.Element("svg", {"class": "chart", "viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "role": "img"})
    svg.set("aria-label", _description(drawn, x_label, y_label))
    _draw_axes(svg, across, up, x_label, y_label)
    for i, one in enumerate(drawn):
        _draw_series(svg, one, across, up, i, line)
    return ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False)


def tick_label(value: float) -> str:
    """A number as an axis shows it: 1,500; 0.05; 2e-06."""
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.0e}"
    return f"{value:,.6f}".rstrip("0").rstrip(".")


def _thinned(series: Series, log: bool) -> Series:
    """The drawable points of a series, at most `_MOST_POINTS`: each the mean of a run of neighbours."""
    points = [
        (x, y)
        for x, y in zip(series.x, series.y, strict=True)
        if _drawable(x) and _drawable(y) and (y > 0 or not log)
    ]
    run = math.ceil(len(points) / _MOST_POINTS) or 1
    runs = [points[i : i + run] for i in range(0, len(points), run)]
    return Series(
        series.label,
        [sum(x for x, _ in r) / len(r) for r in runs],
        [sum(y for _, y in r) / len(r) for r in runs],
    )


def _drawable(value: float) -> bool:
    # Far inside the range of floats, so that no sum, span or tick step of such values overflows or vanishes.
    return value == 0 or 1e-30 < abs(value) < 1e30


def _axis(low: float, high: float, start: float, end: float, *, log: bool, room: int, pad: float) -> _Axis:
    """An axis over low..high with some air, and at most about `room` round ticks."""
    if log:
        low, high = low / 1.12, high * 1.12
        ticks = _decade_ticks(low, high, room)
    else:
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: put it in the middle of a frame
            low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
        low, high = low - (high - low) * pad, high + (high - low) * pad
        ticks = _round_ticks(low, high, room)
    return _Axis(low, high, start, end, log, ticks)


def _round_ticks(low: float, high: float, room: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten within low..high."""
    rough = (high - low) / room
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _decade_ticks(low: float, high: float, room: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**p for p in powers for m in mantissas if low <= m * 10.0**p <= high]
        if len(ticks) <= room + 1:
            break
    else:
        ticks = ticks[:: math.ceil(len(ticks) / room)]
    return ticks if len(ticks) > 1 else _round_ticks(low, high, room)


def _draw_axes(svg: ElementTree.Element, across: _Axis, up: _Axis, x_label: str, y_label: str) -> None:
    grid = ElementTree.SubElement(svg, "g", {"class": "grid", "aria-hidden": "true"})
    for tick in up.ticks:
        y = f"{up.place(tick):.1f}"
        ElementTree.SubElement(grid, "line", {"x1": f"{_LEFT}", "x2": f"{_WIDTH - _RIGHT}", "y1": y, "y2": y})
        _text(grid, _LEFT - 6, up.place(tick) + 3.5, tick_label(tick), "end")
    base = up.start
    ElementTree.SubElement(
        grid,
        "line",
        {"class": "base", "x1": f"{_LEFT}", "x2": f"{_WIDTH - _RIGHT}", "y1": f"{base}", "y2": f"{base}"},
    )
    for tick in across.ticks:
        x = across.place(tick)
        mark = {"class": "base", "x1": f"{x:.1f}", "x2": f"{x:.1f}", "y1": f"{base}", "y2": f"{base + 4}"}
        ElementTree.SubElement(grid, "line", mark)
        _text(grid, x, base + 15, tick_label(tick), "middle")
    _text(grid, (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_label, "middle")
    turned = _text(grid, 0, 0, y_label, "middle")
    turned.set("transform", f"translate(10 {(_TOP + base) / 2}) rotate(-90)")


def _text(parent: ElementTree.Element, x: float, y: float, text: str, anchor: str) -> ElementTree.Element:
    node = ElementTree.SubElement(parent, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor})
    node.text = text
    return node


def _draw_series(svg: ElementTree.Element, one: Series, across: _Axis, up: _Axis, i: int, line: bool) -> None:
    places = [(across.place(x), up.place(y)) for x, y in zip(one.x, one.y, strict=True)]
    if not places:
        return
    group = ElementTree.SubElement(svg, "g", {"class": f"series series-{i % 4}"})
    # The script shows these under the pointer: "x y" pairs, in the order of the points.
    pairs = ",".join(f"{x:.6g} {y:.4g}" for x, y in zip(one.x, one.y, strict=True))
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    curve = {"points": points, "data-label": one.label, "data-values": pairs}
    if not line:
        curve["class"] = "dots"
    ElementTree.SubElement(group, "polyline", curve)
    for x, y in places[-1:] if line else places:
        ElementTree.SubElement(group, "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "2.6"})


def _description(series: Sequence[Series], x_label: str, y_label: str) -> str:
    lines = [
        f"{s.label}: from {tick_label(_short(s.y[0]))} at {tick_label(_short(s.x[0]))} "
        f"to {tick_label(_short(s.y[-1]))} at {tick_label(_short(s.x[-1]))}"
        for s in series
        if s.x
    ]
    return f"{y_label} against {x_label}. " + "; ".join(lines)


def _short(value: float) -> float:
    """The value to four significant digits."""
    return float(f"{value:.4g}")
