"""What the raw seconds say: medians, ratios, shares of a ceiling, bars; and how these are written."""

import math
import statistics

from results import Case, Results, Row

OURS = "pico_fast"
# runs that do less than the case asks for: what no way of doing it can beat, and nobody's peer
FLOORS = (
    "two products",
    "product of the same operations",
    "copy",
    "cross-entropy alone",
    "cut cross-entropy, no classes",
)

SECONDS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
BYTES = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
OPERATIONS_A_SECOND = {"TFLOP/s": 1e12, "GFLOP/s": 1e9}
BYTES_A_SECOND = {"GB/s": 1e9, "MB/s": 1e6}


def is_gpu(results: Results) -> bool:
    """Whether the machine's device is something else than its CPU."""
    return results.machine["device"] != "cpu"


def machine_name(results: Results) -> str:
    """The device in a few words."""
    machine = results.machine
    if is_gpu(results):
        return machine["device"]
    capability = f" ({machine['capability']})" if "capability" in machine else ""
    return f"CPU, {machine['threads']} threads{capability}"


def by_case(rows: list[Row]) -> dict[Case, list[Row]]:
    """The rows of each case, in the order of the file."""
    found: dict[Case, list[Row]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return found


def place(case: Case) -> str:
    """The case's title without its bench, for where that stands above already."""
    return case.title.removeprefix(case.bench).removeprefix(", ")


def run_of(rows: list[Row], *names: str) -> Row | None:
    """The first row with one of these names; names before others."""
    return next((row for name in names for row in rows if row.run == name), None)


def median(row: Row | None) -> float | None:
    """The middle of a run's seconds; None where it was not timed."""
    return statistics.median(row.seconds) if row and row.seconds and not row.why_not else None


def quartiles(row: Row) -> tuple[float, float] | None:
    """Between which the middle half of the seconds lies; None for fewer than two."""
    if median(row) is None or len(row.seconds) < 2:
        return None
    low, _, high = statistics.quantiles(row.seconds, n=4, method="inclusive")
    return low, high


def ratio(row: Row | None, rows: list[Row]) -> float | None:
    """How many times our median in the same case a run's median is."""
    theirs, ours = median(row), median(run_of(rows, OURS))
    return None if theirs is None or ours is None else theirs / ours


def memory_ratio(row: Row, rows: list[Row]) -> float | None:
    """How many times our peak memory in the same case a run's is."""
    ours = run_of(rows, OURS)
    return row.peak_bytes / ours.peak_bytes if row.peak_bytes and ours and ours.peak_bytes else None


def bar_is_met(row: Row, rows: list[Row]) -> bool | None:
    """Whether a run's median is at least as many times ours as it should be; None where nobody can tell."""
    found = ratio(row, rows)
    return None if row.least_ratio is None or found is None else found >= row.least_ratio


def fastest_peer(rows: list[Row]) -> Row | None:
    """The fastest timed run of a case that is neither ours nor a floor."""
    peers = [row for row in rows if median(row) is not None and row.run not in FLOORS and not is_ours(row)]
    return min(peers, key=median, default=None)


def is_ours(row: Row) -> bool:
    """Whether a run is of this package, with whatever options."""
    return row.run == OURS or row.run.startswith(f"{OURS},")


def product_ceiling(results: Results, run: str) -> tuple[str, float] | None:
    """The dtype and rate of the product that a run is held against.

    On a GPU keys are bfloat16 and peers run under autocast, so all are held against the bfloat16
    product; on a CPU those whose name says bf16.
    """
    narrow = is_gpu(results) or "bf16" in run
    for dtype in ("bfloat16", "float32") if narrow else ("float32",):
        if rate := results.ceilings.get(f"{dtype} product"):
            return dtype, rate
    return None


def criterion_share(rows: list[Row]) -> float | None:
    """The part of a training step that it takes longer with the criterion than without."""
    alone = median(run_of(rows, "cross-entropy alone"))
    whole = median(run_of(rows, "with pico_fast", OURS))
    return None if alone is None or whole is None else 1 - alone / whole


def rounded(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, never as a power of ten."""
    value = float(f"{value:.{digits}g}")
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, places)}f}"


def scaled(value: float, units: dict[str, float], *others: float) -> tuple[str, ...]:
    """The unit in which a value has digits before the point, the value in it, and others in it."""
    shown = abs(float(f"{value:.3g}"))  # 0.9996 s are 1.00 s, not 1,000 ms
    name = next((name for name, size in units.items() if shown >= size), list(units)[-1])
    return name, *(rounded(number / units[name]) for number in (value, *others))


def written(value: float | None, units: dict[str, float]) -> str:
    """A value and its unit; nothing for None."""
    if value is None:
        return ""
    unit, number = scaled(value, units)
    return f"{number} {unit}"


def percent(share: float) -> str:
    """A share in percent, with a digit after the point where it is below 10."""
    return f"{100 * share:.{0 if abs(share) >= 0.0995 else 1}f} %"
