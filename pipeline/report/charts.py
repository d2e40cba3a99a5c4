"""Charts: Vega-Lite specifications -> SVG for the page, PNG for DVC.

A specification is a dict with its data. Fields have fixed names (`x`, `y`, `of`), so that nothing in the data is read
as an expression. Lines and texts take the colour of the text around them (`currentColor`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Spec: TypeAlias = dict[str, Any]
Values: TypeAlias = Sequence[Mapping[Any, Any]]
"""Data of a chart: a mapping of fields to values for each mark."""

PALETTE = ("#3b82d0", "#d9730d", "#2f9e5f", "#c9508f", "#9065d0", "#1295a3", "#d64545", "#8a8a1f", "#a5683a", "#7a8290")
"""Colours with a contrast of 3 or more on white and on the page's dark background."""
WIDTH, HEIGHT = 280, 190
"""Of a chart, in pixels: it fits a phone without shrinking its text."""
MOST_MARKS = 600
"""Points of lines that are drawn, and read out, one by one; of more, the lines alone."""
MOST_CLASSES = 24
"""Classes of a confusion matrix that are drawn."""
NUMBERED = 12
"""Classes up to which the counts are written in the cells."""
FEW = 6
"""Values of a setting up to which its axis has a tick at each."""
LOG_RATIO = 20.0
"""Ratio of the largest to the smallest number from which an axis is logarithmic."""
_FAINT = {"labelLimit": 130, "titleLimit": 280, "gridOpacity": 0.15, "domainOpacity": 0.5, "tickOpacity": 0.5}
_SPACED = {"titlePadding": 9, "labelFlush": False, "labelSeparation": 8}
_INKED = dict.fromkeys(("labelColor", "titleColor", "gridColor", "domainColor", "tickColor"), "currentColor")
_CONFIG = {
    "background": None,
    "font": "Helvetica, Arial, sans-serif",
    "axis": _FAINT | _INKED | {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"} | _SPACED,
    "legend": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "labelLimit": 130,
        "titleFontWeight": "normal",
    },
    "header": {"labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 11},
    "view": {"stroke": None},
    "text": {"color": "currentColor"},
    "rule": {"color": "currentColor"},
}
_OPACITY = {
    "field": "share",
    "type": "quantitative",
    "title": "share of the expected",
    "scale": {"domain": [0, 1], "range": [0.08, 1]},
    "legend": None,
}
_PNG_CONFIG = {"background": "white"}
_LABELLED = re.compile(r'<path aria-label="([^"]*)"([^>]*)/>')


def to_svg(spec: Spec) -> str:
    """Return the chart as an SVG element without scripts, whose marks have their values as a label and as a tooltip."""
    import vl_convert  # noqa: PLC0415  (slow to start, and no other stage draws)

    drawn: str = vl_convert.vegalite_to_svg(spec | {"config": _CONFIG})
    # the label is escaped as an attribute is, which is enough for the text of an element
    return _LABELLED.sub(r'<path aria-label="\1"\2><title>\1</title></path>', drawn)


def write_png(spec: Spec, path: Path) -> None:
    """Write the chart to `path` on white, two pixels for each of its own."""
    import vl_convert  # noqa: PLC0415

    path.write_bytes(vl_convert.vegalite_to_png(spec | {"config": _CONFIG | _PNG_CONFIG}, scale=2))


def lines(values: Values, cuts: Sequence[str], x: str, y: tuple[str, str]) -> Spec:
    """Return a line for each `run` of `values`, with a colour for each of `cuts`.

    `x` is "seconds" or "epoch", `y` a field and its title.
    """
    mark = {"type": "line", "point": {"size": 22} if len(values) <= MOST_MARKS else False, "strokeWidth": 1.6}
    seconds = _numbers("seconds", "seconds: encode, then training", log=True)
    encoding = {
        "x": seconds if x == "seconds" else _epochs(x, x, [one[x] for one in values]),
        "y": _numbers(*y) | _not_flat([one[y[0]] for one in values]),
        "detail": {"field": "run", "type": "nominal"},
        "color": _cut_colours(cuts),
    }
    return _sized({"data": {"values": list(values)}, "mark": mark, "encoding": encoding})


def panels(values: Values, cuts: Sequence[str], score: str, tallest: int) -> Spec:
    """Return score against seconds and loss against epochs, a row of two for each of the `settings` in `values`.

    All rows have the same axes, which the last one names; they are lower where they would be taller than `tallest`
    pixels in all.
    """
    size = {"width": 420, "height": max(24, min(HEIGHT, tallest // len({one["settings"] for one in values}) - 40))}
    header = {"labelOrient": "top", "labelAnchor": "start"}
    row = {"field": "settings", "type": "nominal", "title": None, "header": header}
    columns = []
    for x, y in (("seconds", ("value", score)), ("epoch", ("loss", "training loss"))):
        spec = lines(values, cuts, x, y) | size
        columns.append({"data": spec.pop("data"), "facet": {"row": row}, "spec": spec, "spacing": 14})
    return {"hconcat": columns, "resolve": {"scale": {"color": "shared"}}}


def swept(values: Values, cuts: Sequence[str], setting: str, y: str, *, by_cut: bool = True) -> Spec:
    """Return a point for each run, `x` its value of a setting, and a line through the means: of each cut, or of all."""
    numbers = [one["x"] for one in values]
    is_number = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
    if not is_number:
        values = [dict(one) | {"x": str(one["x"])} for one in values]
    log = is_number and min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_RATIO
    horizontal = _numbers("x", setting, log=log) if is_number else _names("x", setting, None)
    if is_number and len(set(numbers)) <= FEW:
        horizontal["axis"] |= {"values": sorted(set(numbers))}
    vertical = _numbers("y", y) | _not_flat([one["y"] for one in values])
    colour = _cut_colours(cuts)
    mean = {"x": horizontal, "y": vertical | {"aggregate": "mean"}} | ({"color": colour} if by_cut else {})
    line = {"type": "line", "opacity": 0.6} | ({} if by_cut else {"color": "currentColor", "strokeWidth": 1})
    layers = [
        {"mark": line, "encoding": mean},
        {"mark": {"type": "point", "filled": True}, "encoding": {"x": horizontal, "y": vertical, "color": colour}},
    ]
    return _sized({"data": {"values": list(values)}, "layer": layers})


def confusion(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> tuple[Spec, int]:
    """Return the matrix of [expected, found, count], darkest where a class is always found so, and how many classes it
    shows: those with most confusions if they are more than `MOST_CLASSES`.
    """
    wrong, total = dict.fromkeys(range(len(labels)), 0), dict.fromkeys(range(len(labels)), 0)
    for expected, found, count in counts:
        total[expected] += count
        for one in {expected, found} if expected != found else ():
            wrong[one] += count
    shown = sorted(sorted(wrong, key=lambda one: -wrong[one])[:MOST_CLASSES])
    named = {number: labels[number] for number in shown}
    values = [
        {"x": named[found], "y": named[expected], "count": count, "share": count / total[expected]}
        for expected, found, count in counts
        if expected in named and found in named
    ]
    order = list(named.values())
    position = {"x": _names("x", "predicted", order), "y": _names("y", "expected", order)}
    cells = {
        "mark": {"type": "rect", "color": PALETTE[0], "stroke": "currentColor", "strokeOpacity": 0.15},
        "encoding": position | {"opacity": _OPACITY, "tooltip": {"field": "count", "type": "quantitative"}},
    }
    layers: list[Spec] = [cells]
    if len(order) <= NUMBERED:
        layers.append({"mark": "text", "encoding": position | {"text": {"field": "count", "type": "quantitative"}}})
    step = 28 if len(order) <= NUMBERED else 20
    size = {"width": {"step": step}, "height": {"step": step}}
    return {"data": {"values": values}, "layer": layers, **size}, len(order)


def diagonal(values: Values, x: str, y: str, *, sized: str | None = None) -> Spec:
    """Return points to compare with the diagonal; with `sized`, in 0..1, of the area `size`, whose title it is."""
    numbers = [float(one[axis]) for one in values for axis in ("x", "y")]
    low, high = (0.0, 1.0) if sized else (min(numbers), max(numbers))
    scale = {"scale": {"domain": [low, high], "nice": False}}
    encoding: Spec = {"x": _numbers("x", x) | scale, "y": _numbers("y", y) | scale}
    if sized:
        area = {"field": "size", "type": "quantitative", "title": sized}
        encoding["size"] = area | {"scale": {"range": [20, 300]}, "legend": None}
    line = {
        "data": {"values": [{"x": low, "y": low}, {"x": high, "y": high}]},
        "mark": {"type": "line", "color": "currentColor", "opacity": 0.4, "strokeDash": [4, 3], "aria": False},
        "encoding": {axis: {"field": axis, "type": "quantitative"} for axis in ("x", "y")},
    }
    marks: list[Spec] = [{"type": "circle", "color": PALETTE[0], "opacity": 0.9 if sized else 0.5}]
    if sized:
        marks.insert(0, {"type": "line", "color": PALETTE[0], "aria": False})
    plain = {axis: encoding[axis] for axis in ("x", "y")}
    layers = [{"mark": mark, "encoding": plain if mark["type"] == "line" else encoding} for mark in marks]
    return _sized({"data": {"values": list(values)}, "layer": [line, *layers]}) | {"height": 240, "width": 240}


def bars(values: Values, order: Sequence[str], x: str, colours: Sequence[str]) -> Spec:
    """Return a horizontal bar for each name `y` in `order`, of lengths `x`, divided by `of` in the order `colours`."""
    encoding = {
        "y": _names("y", "", order),
        "x": _numbers("x", x) | {"stack": "zero"},
        "color": _colours("of", "split", colours),
        "order": {"field": "number", "type": "quantitative"},
    }
    return {
        "data": {"values": list(values)},
        "mark": "bar",
        "encoding": encoding,
        "width": WIDTH - 60,
        "height": {"step": 17},
    }


def costs(values: Values, ways: Sequence[str]) -> Spec:
    """Return a line of seconds `y` against epochs `x` for each way `of` in `ways`."""
    encoding = {
        "x": _epochs("x", "epochs", [one["x"] for one in values]),
        "y": _numbers("y", "seconds, encode included"),
        "color": _colours("of", "", ways),
    }
    return _sized(
        {"data": {"values": list(values)}, "mark": {"type": "line", "strokeWidth": 1.8}, "encoding": encoding}
    )


def over_depth(panels: Mapping[str, Mapping[str, Sequence[float | None]]], shares: Sequence[float]) -> Spec:
    """Return a panel for each title of `panels`, its lines over the `shares` of the blocks before a cut, 0 to 1.

    A figure that is None is unknown; a panel without a known figure is left out.
    """
    drawn = []
    for title, named in panels.items():
        known = [
            (100 * share, y, name)
            for name, line in named.items()
            for share, y in zip(shares, line, strict=True)
            if y is not None
        ]
        if known:
            values = [dict(zip(("x", "y", "of"), one, strict=True)) for one in known]
            encoding = {"x": _numbers("x", "blocks before the cut, %"), "y": _numbers("y", title)}
            encoding["y"] |= _not_flat([y for _, y, _ in known])
            encoding |= {"color": _colours("of", "", list(named))} if len(named) > 1 else {}
            mark = {"type": "line", "point": True, "strokeWidth": 1.6}
            drawn.append(_sized({"data": {"values": values}, "mark": mark, "encoding": encoding}))
    return {"vconcat": drawn, "resolve": {"scale": {"color": "independent"}}}


def _numbers(field: str, title: str, *, log: bool = False) -> Spec:
    scale = {"type": "log", "nice": False, "padding": 8} if log else {"zero": False}
    axis = {"title": title, "labelOverlap": "greedy", "tickCount": 5, "format": ",.4~g"}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def _not_flat(numbers: Sequence[float]) -> Spec:
    """Return the scale of numbers that are all equal, which has no extent of its own; nothing for others."""
    low, high = min(numbers), max(numbers)
    return {} if low < high else {"scale": {"domain": [low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10]}}


def _epochs(field: str, title: str, numbers: Sequence[float]) -> Spec:
    whole = list(range(math.ceil(min(numbers)), math.floor(max(numbers)) + 1))
    axis = {"title": title, "labelOverlap": "greedy", "format": "~g"} | ({"values": whole} if len(whole) <= 12 else {})
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "scale": {"zero": False, "nice": False},
        "axis": axis,
    }


def _names(field: str, title: str, order: Sequence[str] | None) -> Spec:
    axis: Spec = {"title": title, "labelLimit": 110, "labelOverlap": False}
    if field == "x":
        axis |= {"labelAngle": -45}
    scale = {} if order is None else {"scale": {"domain": list(order)}}
    return {"field": field, "type": "nominal", "sort": None, "axis": axis} | scale


def _cut_colours(cuts: Sequence[str]) -> Spec:
    return _colours("cut", "cut", cuts)


def _colours(field: str, title: str, names: Sequence[str]) -> Spec:
    """Return colours of `names` in their order: of the palette, or a scale from dark to light where it has too few."""
    colours: Spec = {"range": list(PALETTE[: len(names)])} if len(names) <= len(PALETTE) else {"scheme": "turbo"}
    legend = {"orient": "top", "columns": 4, "symbolLimit": 0, "symbolOpacity": 1, "title": title or None}
    return {
        "field": field,
        "type": "nominal",
        "title": title,
        "scale": {"domain": list(names)} | colours,
        "legend": legend,
    }


def _sized(spec: Spec) -> Spec:
    return spec | {"width": WIDTH, "height": HEIGHT}
