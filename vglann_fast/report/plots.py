"""Small charts as SVG that follows the page: its style sheet colors them, so light and dark both work.

Hand-made rather than drawn by a plotting library: a chart is a few kilobytes of text that wraps, scales and
recolors with the page, and its points are there for the page's script to read out under the pointer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

# User units of the drawing; the page scales it to its column.
_WIDTH, _HEIGHT = 360, 212
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 8, 10, 38
_MOST_POINTS = 240
_MOST_DOTS = 400
_NAMES, _BAR_ROW = 112, 22  # of a bar chart: width of its names, height of a bar and the gap beneath


@dataclass(frozen=True)
class Chart:
    """A chart with its title, the names of its series and the last value of the first one."""

    title: str
    labels: list[str]
    last: str
    svg: str


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


def bars(values: Sequence[tuple[str, float]], *, x_label: str, mark: tuple[str, float] | None = None) -> str:
    """Draw (name, value) pairs as bars from zero, one under the other, each with its value beside it.

    mark: a name and a value that a line across all bars shows, e.g. the least there can be.
    Values that are negative, not finite or beyond 1e±30 are left out. Returns and raises as `chart`.
    """
    drawn = [(name, value) for name, value in values if _drawable(value) and value >= 0]
    if not drawn:
        raise ValueError("a chart needs at least one finite point")
    marked = [mark] if mark is not None and _drawable(mark[1]) and mark[1] >= 0 else []
    base = _TOP + 12 * len(marked) + _BAR_ROW * len(drawn)
    top = max(value for _, value in (*drawn, *marked)) or 1.0
    across = _axis(0, top, _NAMES, _WIDTH - 44, log=False, room=4, pad=0)
    svg = ElementTree.Element(
        "svg", {"class": "chart", "viewBox": f"0 0 {_WIDTH} {base + _BOTTOM}", "role": "img"}
    )
    told = [f"{name}: {tick_label(_short(value))}" for name, value in (*drawn, *marked)]
    svg.set("aria-label", f"{x_label}. " + "; ".join(told))
    grid = ElementTree.SubElement(svg, "g", {"class": "grid", "aria-hidden": "true"})
    for tick in across.ticks:
        x = f"{across.place(tick):.1f}"
        ElementTree.SubElement(grid, "line", {"x1": x, "x2": x, "y1": f"{_TOP}", "y2": f"{base}"})
        _text(grid, across.place(tick), base + 15, tick_label(tick), "middle")
    _text(grid, (_NAMES + _WIDTH - 44) / 2, base + _BOTTOM - 6, x_label, "middle")
    group = ElementTree.SubElement(svg, "g", {"class": "series series-0", "aria-hidden": "true"})
    for i, (name, value) in enumerate(drawn):
        y, end = base - _BAR_ROW * (len(drawn) - i), across.place(value)
        size = {"x": f"{_NAMES}", "y": f"{y}", "width": f"{end - _NAMES:.1f}", "height": f"{_BAR_ROW - 8}"}
        ElementTree.SubElement(group, "rect", size)
        _text(group, _NAMES - 6, y + 11, name, "end")
        _text(group, end + 5, y + 11, f"{value:.4g}", "start")
    for name, value in marked:
        x = f"{across.place(value):.1f}"
        ElementTree.SubElement(svg, "line", {"class": "mark", "x1": x, "x2": x, "y1": "14", "y2": f"{base}"})
        _text(svg, across.place(value), 10, f"{name} {value:.4g}", "middle")
    return ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False)


def scatter(
    groups: Sequence[Series], *, x_label: str, y_label: str, cover: Sequence[tuple[float, float]] = ()
) -> str:
    """Draw groups of points in one frame, the first beneath the others; of each at most 400, evenly spaced.

    Both axes count alike, so that angles and distances are as they are. cover: points (x, y) that the frame reaches
    though they are not drawn, for several with one frame. Returns and raises as `chart`.
    """
    drawn = []
    for group in groups:
        pairs = zip(group.x, group.y, strict=True)
        points = [(x, y) for x, y in pairs if _drawable(x) and _drawable(y)]
        drawn.append(points[:: -(-len(points) // _MOST_DOTS) or 1])
    every = [point for points in drawn for point in points]
    if not every:
        raise ValueError("a chart needs at least one finite point")
    across, up = _square_axes([*every, *cover])
    svg = ElementTree.Element("svg", {"class": "chart", "viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "role": "img"})
    counts = "; ".join(f"{group.label}: {len(group.x)} points" for group in groups)
    svg.set("aria-label", f"{y_label} against {x_label}. {counts}")
    _draw_axes(svg, across, up, x_label, y_label)
    for i, points in enumerate(drawn):
        dots = ElementTree.SubElement(svg, "g", {"class": f"series series-{i % 4} cloud"})
        for x, y in points:
            place = {"cx": f"{across.place(x):.1f}", "cy": f"{up.place(y):.1f}", "r": "1.8"}
            ElementTree.SubElement(dots, "circle", place)
    return ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False)


def _square_axes(points: Sequence[tuple[float, float]]) -> tuple[_Axis, _Axis]:
    """Axes about all points, a unit of one as long as a unit of the other."""
    sides = [(min(values), max(values)) for values in zip(*points, strict=True)]
    room = (_WIDTH - _RIGHT - _LEFT, _HEIGHT - _BOTTOM - _TOP)
    unit = max((high - low) / r for (low, high), r in zip(sides, room, strict=True)) * 1.08 or 1.0
    (left, right), (low, high) = (
        ((a + b) / 2 - unit * r / 2, (a + b) / 2 + unit * r / 2)
        for (a, b), r in zip(sides, room, strict=True)
    )
    across = _axis(left, right, _LEFT, _WIDTH - _RIGHT, log=False, room=6, pad=0)
    return across, _axis(low, high, _HEIGHT - _BOTTOM, _TOP, log=False, room=5, pad=0)


def tick_label(value: float) -> str:
    """A number as an axis shows it: 1,500; 0.05; 2e-06."""
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.0e}"
    return f"{value:,.6f}".rstrip("0").rstrip(".")


def _thinned(series: Series, log: bool) -> Series:
    """The drawable points of a series, at most `_MOST_POINTS`: each the mean of a run of neighbors."""
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
