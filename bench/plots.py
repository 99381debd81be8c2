"""The plots of docs/benchmarks: time and memory against the number of keys, the criterion in a step."""

import io
import itertools
from collections.abc import Callable

import figures
import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Case, Results, Row

BY_KEYS = "contrast, by number of keys"
MEMORY_BY_KEYS = "memory, by number of keys"
TIME, MEMORY, STEP = "time by number of keys", "memory by number of keys", "share of a step"

# the same bytes from the same results, whatever the settings of whoever draws
STYLE = {
    "svg.hashsalt": "benchmarks",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
OURS_COLOURS = ("#c0392b", "#e67e22", "#b9770e")
COLOURS = ("#2471a3", "#555555", "#1e8449", "#7d3c98", "#17a589", "#884ea0", "#2c3e50")
MARKERS = "osD^vPX*<>"
CEILING_COLOUR = "#999999"
MOST_TICKS = 7  # numbers of keys that fit below an axis

Series = dict[str, list[tuple[float, float]]]  # run -> (keys, value)


def version() -> str:
    """What draws: another version may write other bytes."""
    return matplotlib.__version__


def series(rows: list[Row], value: Callable[[Row], float | None]) -> Series:
    """Points of each run, by number of keys; runs of several data sets or numbers of anchors apart."""
    kinds = {(row.case.data_set, row.case.anchors, row.case.data) for row in rows}
    found: Series = {}
    for row in rows:
        if not (y := value(row)):  # not run, or nothing that a logarithm could show
            continue
        case = row.case
        kind = "" if len(kinds) == 1 else f", {case.data_set}, {case.anchors:,} anchors"
        found.setdefault(row.run + kind, []).append((case.keys, y))
    return {name: sorted(points) for name, points in found.items()}


def roofs(rows: list[Row], results: Results) -> Series:
    """The least time of each case: its operations at the rate of the product."""
    found: dict[str, set[tuple[float, float]]] = {}
    for row in rows:
        ceiling = figures.product_ceiling(results, row.run)
        if ceiling and row.case.operations > 0:
            dtype, rate = ceiling
            points = found.setdefault(f"its products alone, {dtype}", set())
            points.add((row.case.keys, row.case.operations / rate))
    return {name: sorted(points) for name, points in found.items()}


def draw_lines(axes: Axes, lines: Series, dashed: Series) -> None:
    """A line for each run, and a legend beside them whose order is that of the lines where they end."""
    colours = {True: itertools.cycle(OURS_COLOURS), False: itertools.cycle(COLOURS)}
    handles = []
    for marker, (name, points) in zip(itertools.cycle(MARKERS), lines.items(), strict=False):
        ours = name.startswith(figures.OURS)
        (handle,) = axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=next(colours[ours]),
            linewidth=2.2 if ours else 1.4,
            marker=marker,
            markersize=5,
            zorder=3 if ours else 2,
        )
        handles.append((points[-1][1] / points[-1][0], handle))
    for style, (name, points) in zip(itertools.cycle(("--", ":")), dashed.items(), strict=False):
        (handle,) = axes.plot(*zip(*points, strict=True), style, label=name, color=CEILING_COLOUR, zorder=1)
        handles.append((points[-1][1] / points[-1][0], handle))
    # a key's part, for not all lines reach the same number of keys
    handles.sort(key=lambda item: -item[0])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(handles=[handle for _, handle in handles], loc="center left", bbox_to_anchor=(1.02, 0.5))


def subject(rows: list[Row]) -> str:
    """What all rows of a plot share."""
    cases = [row.case for row in rows]
    anchors = {f"{case.anchors:,} anchors" for case in cases}
    return ", ".join(one.pop() for one in ({c.data_set for c in cases}, anchors) if len(one) == 1)


def keys_plot(
    title: str, rows: list[Row], lines: Series, dashed: Series, unit: str, size: float
) -> Figure | None:
    """Something against the number of keys, both logarithmic; None where nothing was measured."""
    if not lines:
        return None
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    draw_lines(axes, in_unit(lines, size), in_unit(dashed, size))
    axes.set_title(", ".join(part for part in (title, subject(rows)) if part), loc="left")
    axes.set_xlabel("keys")
    axes.set_ylabel(unit)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.set_minor_formatter("")
    measured = sorted({row.case.keys for row in rows})
    if len(measured) <= MOST_TICKS:
        axes.set_xticks(measured)
    return figure


def in_unit(lines: Series, size: float) -> Series:
    """The same points, their values in another unit."""
    return {name: [(x, y / size) for x, y in points] for name, points in lines.items()}


def time_plot(results: Results) -> Figure | None:
    """Seconds of loss + gradient against keys, over what its matrix products alone would take."""
    rows = [row for row in results.rows if row.case.bench == BY_KEYS]
    lines = series(rows, figures.median)
    timed = [row for row in rows if figures.median(row)]
    title = "Time of loss + gradient"
    return keys_plot(title, rows, lines, roofs(timed, results), "milliseconds", 1e-3)


def memory_plot(results: Results) -> Figure | None:
    """Peak memory against keys: of the cases made for it, or beside the times where it was kept there."""
    for bench in (MEMORY_BY_KEYS, BY_KEYS):
        rows = [row for row in results.rows if row.case.bench == bench]
        if lines := series(rows, lambda row: row.peak_bytes):
            title = "Peak memory of loss + gradient beyond its inputs"
            return keys_plot(title, rows, lines, {}, "megabytes", 1e6)
    return None


def step_plot(results: Results) -> Figure | None:
    """For each network a bar of one training step: cross-entropy alone, and what the criterion adds."""
    cases: dict[Case, tuple[float, float]] = {}
    for case, rows in figures.by_case(results.rows).items():
        share = figures.criterion_share(rows) if case.bench == "training step" else None
        if share is not None:
            alone = figures.median(figures.run_of(rows, "cross-entropy alone"))
            # noise alone makes it negative: then there is nothing to draw
            cases[case] = max(0.0, share), alone
    if not cases:
        return None
    figure = Figure(figsize=(8.4, 1.3 + 0.75 * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    for level, (share, alone) in enumerate(cases.values()):
        added = alone * share / (1 - share)
        parts = (
            (0.0, 1 - share, "#c8ccd0", "network and cross-entropy", alone),
            (1 - share, share, OURS_COLOURS[0], "added by PiCo", added),
        )
        for left, width, colour, name, seconds in parts:
            label = name if level == 0 else None
            axes.barh(level, 100 * width, left=100 * left, height=0.5, color=colour, label=label)
            words = f"{figures.written(seconds, figures.SECONDS)}, {figures.percent(width)}"
            if left == 0:
                axes.text(1, level, words, va="center", color="#222222")
            else:  # beside the bar, which may be thinner than the words
                axes.text(101, level, words, va="center", color=colour)
    axes.set_yticks(range(len(cases)), [figures.place(case) for case in cases])
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("% of a training step")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


PLOTS = {TIME: time_plot, MEMORY: memory_plot, STEP: step_plot}


def svg(figure: Figure) -> str:
    """The figure as text, without a date."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def draw(results: Results) -> dict[str, str]:
    """What a plot shows -> the plot as SVG; those that nothing was measured for are left out."""
    with matplotlib.style.context(["default", STYLE]):
        drawn = {shows: plot(results) for shows, plot in PLOTS.items()}
        return {shows: svg(figure) for shows, figure in drawn.items() if figure}
