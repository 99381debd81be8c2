"""The few figures that the README shows of each machine."""

from collections.abc import Callable
from dataclasses import dataclass

import figures
from results import Case, Results, Row
from tables import cell, table

NOT_ON_A_GPU = "GPU: not measured yet; the predictions stand in [docs/kernels.md]({kernels})."
IN_WORDS = {
    "eager": "the eager formula",
    "index_add": "index_add_",
    "two products": "its two bare matrix products",
    "product of the same operations": "one product of as many operations",
    "plain PyTorch": "the same sample in plain PyTorch",
    "plain PyTorch, in blocks": "the same in blocks of anchors",
}
# benches that know the peak memory of loss and gradient with all keys
MEMORY = ("memory, by number of keys", "contrast, all keys", "contrast, by number of keys")


@dataclass(frozen=True)
class Headline:
    """A line of the README's table: ours beside what is usual, in the largest case that has both."""

    what: str
    bench: str
    usual: tuple[str, ...]  # names of the peer that everybody knows
    detail: str = ""  # how the case's detail begins
    floors: tuple[str, ...] = ()


HEADLINES = (
    Headline(
        "loss + gradient, all keys",
        "contrast, all keys",
        ("eager",),
        floors=("two products", "product of the same operations"),
    ),
    Headline("hardest sampling", "contrast, hardest", ("matmul + topk",)),
    *(
        Headline(what, f"sampled contrast, {name}", ("plain PyTorch",))
        for what, name in (
            ("semi-hard sampling (default)", "semi_hard"),
            ("semi-hard, random positives", "semi_hard, random positives"),
            ("bounded sampling", "bounded"),
            ("random sampling", "random"),
        )
    ),
    *(
        Headline(f"region pooling, {way}", "region pooling", ("index_add_", "index_add"), way)
        for way in ("forward", "forward + backward")
    ),
)


def largest(
    cases: dict[Case, list[Row]], has_both: Callable[[list[Row]], bool]
) -> tuple[Case, list[Row]] | None:
    """The largest case that has what is asked for, on clustered data where there is such."""
    found = [(case, rows) for case, rows in cases.items() if has_both(rows)]

    def size(item: tuple[Case, list[Row]]) -> tuple:
        """What the largest is chosen by."""
        case = item[0]
        return case.data == "clustered", case.anchors * case.keys, case.bytes

    return max(found, key=size, default=None)


def times(row: Row, rows: list[Row]) -> str:
    """As "7.5 x the eager formula"."""
    return f"{figures.rounded(figures.ratio(row, rows), 2)} x {IN_WORDS.get(row.run, row.run)}"


def speed(headline: Headline, results: Results) -> dict[str, str] | None:
    """Ours beside the usual way, the fastest peer and the floor; None where the case is missing."""
    cases = {
        case: rows
        for case, rows in figures.by_case(results.rows).items()
        if case.bench == headline.bench
        and (not headline.detail or case.detail.split(",")[0] == headline.detail)
    }

    def timed(rows: list[Row], names: tuple[str, ...]) -> bool:
        """Whether one of these runs and ours have times."""
        return figures.ratio(figures.run_of(rows, *names), rows) is not None

    # where the usual way fits nowhere into memory, the floor still tells something
    found = largest(cases, lambda rows: timed(rows, headline.usual))
    found = found or largest(cases, lambda rows: timed(rows, headline.floors))
    if not found:
        return None
    case, rows = found
    parts = []
    usual, fastest = figures.run_of(rows, *headline.usual), figures.fastest_peer(rows)
    if timed(rows, headline.usual):
        parts.append(times(usual, rows) + (", the fastest peer" if usual is fastest else ""))
    if fastest and fastest is not usual:
        parts.append(f"{times(fastest, rows)}, the fastest peer")
    if timed(rows, headline.floors):
        parts.append(times(figures.run_of(rows, *headline.floors), rows))
    if case.bytes and headline.bench == "region pooling" and "copy" in results.ceilings:
        rate = case.bytes / figures.median(figures.run_of(rows, figures.OURS))
        parts.append(f"{figures.percent(rate / results.ceilings['copy'])} of a copy's bandwidth")
    where = figures.place(case).removeprefix(f"{headline.detail}, ")
    return {"what": headline.what, "pico_fast": "; ".join(parts), "case": where}


def memory(results: Results) -> dict[str, str] | None:
    """Peak memory of loss and gradient beside the eager formula's."""
    cases = {
        case: rows
        for case, rows in figures.by_case(results.rows).items()
        if case.bench in MEMORY or (case.bench == "memory" and case.detail == "all")
    }

    def peaks(rows: list[Row]) -> list[int]:
        """Our bytes and those of the eager formula; fewer where one is not known."""
        runs = (figures.run_of(rows, name) for name in (figures.OURS, "eager"))
        return [row.peak_bytes for row in runs if row and row.peak_bytes]

    found = largest(cases, lambda rows: len(peaks(rows)) == 2)
    if not found:
        return None
    ours, eager = (figures.written(peak, figures.BYTES) for peak in peaks(found[1]))
    part = figures.rounded(peaks(found[1])[1] / peaks(found[1])[0], 2)
    return {
        "what": "memory, all keys",
        "pico_fast": f"1/{part} of the eager formula: {ours} of {eager}",
        "case": figures.place(found[0]),
    }


def share_of_a_step(results: Results) -> list[dict[str, str]]:
    """What the criterion takes of the training step of each network."""
    found = []
    for case, rows in figures.by_case(results.rows).items():
        share = figures.criterion_share(rows) if case.bench == "training step" else None
        if share is not None:
            line = {"what": "share of a training step", "pico_fast": figures.percent(share)}
            found.append(line | {"case": figures.place(case)})
    return found


def headlines(results: Results) -> list[str]:
    """The table of one machine; lines whose case was not measured are left out."""
    all_keys, *others = (speed(headline, results) for headline in HEADLINES)
    found = [all_keys, memory(results), *others, *share_of_a_step(results)]
    rows = [{name: cell(text) for name, text in row.items()} for row in found if row]
    return table(rows) if rows else ["Nothing of what is shown here was measured."]


def figures_block(machines: list[Results], page: str, kernels: str) -> str:
    """What stands between the README's markers; `page` and `kernels` are the addresses it points to."""
    lines = []
    for results in machines:
        facts = [figures.machine_name(results)]
        facts += [f"torch {results.machine['torch']}"] if "torch" in results.machine else []
        facts += [results.machine["date"]] if "date" in results.machine else []
        lines += [f"{', '.join(facts)}:", "", *headlines(results), ""]
    if not any(figures.is_gpu(results) for results in machines):
        lines += [NOT_ON_A_GPU.format(kernels=kernels)]
    lines += [f"All runs, spreads, ceilings, bars and plots: [{page}]({page})."]
    return "\n".join(lines)
