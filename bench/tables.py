"""The tables of docs/benchmarks.md: a section for each machine, a table for each bench."""

import re

import figures
from figures import written
from results import Case, Results, Row

LEFT = ("case", "run", "bar", "what", "pico_fast")  # columns of words; numbers stand at the right


def cell(words: str) -> str:
    """Text that a table shows as it is, on one line."""
    return re.sub(r"([|<*`])", r"\\\1", " ".join(words.split()))


def table(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a table; a column that is empty in every row is left out."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [f"| {' | '.join(columns)} |"]
    lines.append("|" + "|".join("---" if name in LEFT else "---:" for name in columns) + "|")
    return lines + [f"| {' | '.join(row[name] for name in columns)} |" for row in rows]


def bar_cell(row: Row, rows: list[Row]) -> str:
    """The bar and whether it is met."""
    if row.least_ratio is None:
        return ""
    verdict = {True: "met", False: "**missed**", None: "not judged"}[figures.bar_is_met(row, rows)]
    return f"{row.least_ratio:.3g} x: {verdict}"


def time_cells(row: Row, rows: list[Row]) -> dict[str, str]:
    """Median, spread, rounds and ratio; of a run without times the reason."""
    if row.why_not:
        column = "median" if any(other.seconds for other in rows) else "peak memory"
        return {column: f"not measured: {cell(row.why_not)}"}
    found = figures.median(row)
    if found is None:
        return {}
    unit, number = figures.scaled(found, figures.SECONDS)
    cells = {"median": f"{number} {unit}", "rounds": str(len(row.seconds))}
    if around := figures.quartiles(row):
        _, _, low, high = figures.scaled(found, figures.SECONDS, *around)
        cells["25 to 75 %"] = f"{low} to {high} {unit}"
    times = figures.ratio(row, rows)
    return cells | ({} if times is None else {"x pico_fast": figures.rounded(times)})


def rate_cells(row: Row, results: Results) -> dict[str, str]:
    """What the case needs at least, by the time it took, and the share of this machine's ceiling."""
    found, case = figures.median(row), row.case
    if not found:
        return {}
    cells = {}
    if case.operations > 0:
        rate = case.operations / found
        cells["multiplies"] = written(rate, figures.OPERATIONS_A_SECOND)
        if ceiling := figures.product_ceiling(results, row.run):
            dtype, most = ceiling
            cells["of the product"] = f"{figures.percent(rate / most)} ({dtype})"
    if case.bytes > 0:
        rate = case.bytes / found
        cells["moves"] = written(rate, figures.BYTES_A_SECOND)
        if most := results.ceilings.get("copy"):
            cells["of the copy"] = figures.percent(rate / most)
    return cells


def memory_cells(row: Row, rows: list[Row]) -> dict[str, str]:
    """Peak memory, and how many times ours it is."""
    times = figures.memory_ratio(row, rows)
    return {
        "peak memory": written(row.peak_bytes, figures.BYTES),
        "x pico_fast's memory": "" if times is None else figures.rounded(times),
    }


def run_cell(row: Row, fastest: Row | None) -> str:
    """The run's name: bold for the fastest peer, italic for a floor."""
    name = cell(row.run)
    if row is fastest:
        return f"**{name}**"
    return f"*{name}*" if row.run in figures.FLOORS else name


COLUMNS = (
    "case", "run", "median", "25 to 75 %", "rounds", "x pico_fast", "multiplies", "of the product",
    "moves", "of the copy", "peak memory", "x pico_fast's memory", "bar",
)  # fmt: skip


def bench_table(cases: dict[Case, list[Row]], results: Results) -> list[str]:
    """A table of the cases of one bench, a line for each run."""
    lines = []
    for case, rows in cases.items():
        fastest = figures.fastest_peer(rows)
        for row in rows:
            # the case is named once: what follows it belongs to it
            cells = {"case": cell(figures.place(case)) if row is rows[0] else ""}
            cells |= {"run": run_cell(row, fastest), "bar": bar_cell(row, rows)}
            cells |= memory_cells(row, rows) | time_cells(row, rows) | rate_cells(row, results)
            lines.append({name: cells.get(name, "") for name in COLUMNS})
    return table(lines)


def bars(results: Results) -> str:
    """How many bars are met, and which are not."""
    met, missed, unknown = 0, [], []
    for rows in figures.by_case(results.rows).values():
        for row in rows:
            if row.least_ratio is None:
                continue
            verdict = figures.bar_is_met(row, rows)
            name = f"{cell(row.case.title)}: {cell(row.run)}"
            if verdict is None:
                unknown.append(name)
            elif verdict:
                met += 1
            else:
                found = figures.rounded(figures.ratio(row, rows))
                missed.append(f"{name} ({found} x, the bar is {row.least_ratio:.3g})")
    text = f"Bars: {met} of {met + len(missed)} met"
    if missed:
        text += f"; **missed**: {'; '.join(missed)}"
    if unknown:
        text += f"; not judged, for a run was not measured: {'; '.join(unknown)}"
    return f"{text}."


def ceilings(results: Results) -> list[str]:
    """What this machine reached in plain products and a copy."""
    rows = []
    for name, rate in results.ceilings.items():
        units = figures.BYTES_A_SECOND if name == "copy" else figures.OPERATIONS_A_SECOND
        rows.append({"what": cell(name), "rate": written(rate, units)})
    return table(rows) if rows else []


def machine_section(results: Results, plots: dict[str, str]) -> list[str]:
    """The section of a machine; `plots`: what a plot shows -> its address."""
    facts = ", ".join(f"{k} {v}" for k, v in results.machine.items() if k != "device")
    lines = [f"## {cell(figures.machine_name(results))}", "", f"{cell(facts)}.", "", bars(results)]
    if results.ceilings:
        lines += ["", "Ceilings, measured in the same session:", "", *ceilings(results)]
    for shows, address in plots.items():
        lines += ["", f"![{shows}]({address})"]
    benches: dict[str, dict[Case, list[Row]]] = {}
    for case, rows in figures.by_case(results.rows).items():
        benches.setdefault(case.bench, {})[case] = rows
    for bench, cases in benches.items():
        lines += ["", f"### {cell(bench)}", "", *bench_table(cases, results)]
    if results.counts:
        counts = [{"what": cell(k), "number": f"{v:,}"} for k, v in results.counts.items()]
        lines += ["", "### Counts", "", "What no noise touches.", "", *table(counts)]
    return lines
