"""The report: figures by hand on made-up results, the committed page on real ones."""

# ruff: noqa: E402, for the benchmarks are scripts: their folder has to be found before they are

import dataclasses
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import figures
import headlines
import plots
import report
import tables
from results import Case, Results, Row, file_name

CPU = {"device": "cpu", "threads": "2", "capability": "AVX512", "torch": "2.13.0", "commit": "abc"}
GPU = {"device": "NVIDIA H100", "capability": "9.0", "torch": "2.13.0", "commit": "abc"}
README = f"before\n\n{report.START}\nold\n{report.END}\n\nafter {report.PAGE}\n"
NOT_MEASURED = "GPU: not measured yet; the predictions stand in [docs/kernels.md]"
ALL_KEYS = Case("contrast, all keys", "COCO-Stuff", 171_000, 1024, 0.1, operations=1.8e11)


def around(middle: float) -> list[float]:
    """Five rounds whose median is known, in no order."""
    return [1.5 * middle, middle, 0.8 * middle, 1.2 * middle, 0.9 * middle]


def timed(case: Case, run: str, seconds: float, bar: float | None = None) -> Row:
    """A run with this median."""
    return Row(case, run, around(seconds), least_ratio=bar)


def all_keys() -> list[Row]:
    """The eager formula 8 times ours, the analytic 1.6 times, the two products 0.7 times: a bar missed."""
    return [
        timed(ALL_KEYS, "pico_fast", 1.0),
        timed(ALL_KEYS, "pico_fast, bf16 bank", 0.5),
        timed(ALL_KEYS, "two products", 0.7, bar=1 / 1.35),
        timed(ALL_KEYS, "eager", 8.0, bar=5.0),
        timed(ALL_KEYS, "analytic", 1.6),
        Row(ALL_KEYS, "attention, flex", least_ratio=1.0, why_not="out of memory: 9 GB of 8 | 1"),
    ]


def made_up(machine: dict[str, str]) -> Results:
    """Results with every kind of row."""
    rows = all_keys()
    for keys in (1_000, 10_000, 100_000):
        sweep = Case("contrast, by number of keys", "COCO-Stuff", keys, 256, operations=1024.0 * keys)
        rows += [timed(sweep, "pico_fast", 1e-6 * keys), timed(sweep, "eager", 5e-6 * keys)]
        case = Case("memory, by number of keys", "COCO-Stuff", keys, 1024)
        rows += [Row(case, "pico_fast", peak_bytes=10**7)]
        rows += [Row(case, "eager", peak_bytes=9000 * keys)]
    hardest = Case("contrast, hardest", "COCO-Stuff", 171_000, 512, 0.1, operations=4.5e10)
    rows += [timed(hardest, "pico_fast", 0.5), timed(hardest, "matmul + topk", 1.7)]
    sampled = Case("sampled contrast, bounded", "171 classes x 1,000", 171_000, 1024)
    rows += [timed(sampled, "pico_fast", 0.1), timed(sampled, "plain PyTorch", 0.25, bar=1.5)]
    rows += [timed(sampled, "plain PyTorch, in blocks", 0.2, bar=1.5)]
    pooling = Case("region pooling", "19 classes", detail="forward, float32, planes", bytes=1e8)
    rows += [timed(pooling, "pico_fast", 0.02), timed(pooling, "index_add", 0.08, bar=3.0)]
    step = Case("training step", "COCO-Stuff", detail="small_network")
    rows += [timed(step, "pico_fast", 0.5), timed(step, "cross-entropy alone", 0.45)]
    ceilings = {"float32 product": 2e11, "bfloat16 product": 8e11, "copy": 1e10}
    return Results(machine, ceilings, rows, {"operations of a criterion step": 321})


@pytest.fixture
def folder(tmp_path) -> Path:
    """A result folder with one machine, a CPU."""
    made_up(CPU).write(tmp_path / "results" / file_name(CPU))
    return tmp_path / "results"


@pytest.fixture
def root(tmp_path) -> Path:
    """A repository with nothing but a README."""
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def contents(root: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def line_of(text: str, run: str, bench: str = "contrast, all keys") -> list[str]:
    """Cells of a run's line in the table of a bench."""
    section = text.split(f"### {bench}\n")[1].split("\n### ")[0]
    lines = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in section.splitlines() if "|" in line]
    head = lines[0]
    (cells,) = (line for line in lines if line[head.index("run")].strip("*") == run)
    return dict(zip(head, cells, strict=True))


def test_committed_page_and_readme_say_what_the_results_say():
    assert report.check() == [], "not what bench/results says: run make bench-report, and commit"


def test_results_come_back_as_written(folder):
    found = Results.read(folder / "cpu-2-threads.json")
    assert found == dataclasses.replace(
        made_up(CPU),
        rows=[
            dataclasses.replace(row, seconds=[float(f"{s:.4g}") for s in row.seconds])
            for row in made_up(CPU).rows
        ],
    )


def test_figures_by_hand():
    rows = all_keys()
    ours, _, products, eager, analytic, flex = rows
    assert figures.median(eager) == 8.0 and figures.median(flex) is None
    assert figures.quartiles(ours) == pytest.approx((0.9, 1.2))
    assert figures.ratio(eager, rows) == 8.0 and figures.ratio(flex, rows) is None
    assert figures.bar_is_met(eager, rows) is True
    assert figures.bar_is_met(products, rows) is False
    assert figures.bar_is_met(flex, rows) is None and figures.bar_is_met(analytic, rows) is None
    assert figures.fastest_peer(rows) is analytic
    results = made_up(CPU)
    assert figures.product_ceiling(results, "eager") == ("float32", 2e11)
    assert figures.product_ceiling(results, "pico_fast, bf16 bank") == ("bfloat16", 8e11)
    assert figures.product_ceiling(made_up(GPU), "eager") == ("bfloat16", 8e11)
    step = [row for row in results.rows if row.case.bench == "training step"]
    assert figures.criterion_share(step) == pytest.approx(0.1)


def test_bar_is_met_by_exactly_its_ratio():
    rows = [timed(ALL_KEYS, "pico_fast", 1.0), timed(ALL_KEYS, "eager", 5.0, bar=5.0)]
    assert figures.bar_is_met(rows[1], rows)


@pytest.mark.parametrize(
    ("value", "units", "words"),
    (
        (0.1172, figures.SECONDS, "117 ms"),
        (0.9996, figures.SECONDS, "1.00 s"),
        (2.5e-7, figures.SECONDS, "0.250 µs"),
        (12_345.0, figures.SECONDS, "12,300 s"),
        (16_784_384, figures.BYTES, "16.8 MB"),
        (0, figures.BYTES, "0 kB"),
        (7.9e14, figures.OPERATIONS_A_SECOND, "790 TFLOP/s"),
        (None, figures.SECONDS, ""),
    ),
)
def test_numbers_in_words(value, units, words):
    assert figures.written(value, units) == words


def test_table_of_a_bench(folder, root):
    report.write(folder, root)
    text = (root / report.PAGE).read_text()
    ours = line_of(text, "pico_fast")
    assert ours["case"] == "COCO-Stuff at 0.1 of the queue, 1,024 x 171,000"
    assert (ours["median"], ours["25 to 75 %"], ours["rounds"]) == (
        "1.00 s",
        "0.900 to 1.20 s",
        "5",
    )
    assert (ours["multiplies"], ours["of the product"]) == ("180 GFLOP/s", "90 % (float32)")
    assert line_of(text, "pico_fast, bf16 bank")["of the product"] == "45 % (bfloat16)"
    eager, products = line_of(text, "eager"), line_of(text, "two products")
    assert (eager["x pico_fast"], eager["bar"]) == ("8.00", "5 x: met")
    assert (products["run"], products["bar"]) == ("*two products*", "0.741 x: **missed**")
    assert line_of(text, "analytic")["run"] == "**analytic**"
    pooling = line_of(text, "pico_fast", "region pooling")
    assert (pooling["moves"], pooling["of the copy"]) == ("5.00 GB/s", "50 %")
    assert "multiplies" not in pooling and "peak memory" not in pooling
    memory = text.split("### memory, by number of keys")[1]
    assert "| eager | 900 MB | 90.0 |" in memory
    assert "| operations of a criterion step | 321 |" in text
    assert "Bars: 4 of 5 met; **missed**: contrast, all keys, COCO-Stuff at 0.1 of the queue" in text


def test_run_without_times_shows_the_reason(folder, root):
    report.write(folder, root)
    flex = line_of((root / report.PAGE).read_text(), "attention, flex")
    assert flex["median"] == r"not measured: out of memory: 9 GB of 8 \| 1"
    assert flex["x pico_fast"] == "" and flex["bar"] == "1 x: not judged"


def test_readme_changes_between_its_markers_alone(folder, root):
    report.write(folder, root)
    text = (root / "README.md").read_text()
    before, after = README.split(f"{report.START}\nold\n{report.END}")
    assert text.startswith(before + report.START) and text.endswith(report.END + after)
    assert "old" not in text
    assert (
        "| loss + gradient, all keys | 8.0 x the eager formula; 1.6 x analytic, the fastest peer; "
        "0.70 x its two bare matrix products | COCO-Stuff at 0.1 of the queue, 1,024 x 171,000 |"
    ) in text
    assert "| memory, all keys | 1/90 of the eager formula: 10.0 MB of 900 MB |" in text
    assert "| hardest sampling | 3.4 x matmul + topk, the fastest peer |" in text
    assert (
        "| bounded sampling | 2.5 x the same sample in plain PyTorch; 2.0 x the same in blocks of anchors, "
        "the fastest peer | 171 classes x 1,000, 1,024 x 171,000 |"
    ) in text
    assert (
        "| region pooling, forward | 4.0 x index_add_, the fastest peer; 50 % of a copy's bandwidth "
        "| float32, planes, 19 classes |"
    ) in text
    assert "| share of a training step | 10 % | small_network, COCO-Stuff |" in text
    # not among the made-up results
    for missing in ("semi-hard", "random", "forward + backward"):
        assert missing not in text


@pytest.mark.parametrize("text", ("nothing", report.START, f"{report.END}\n{report.START}"))
def test_readme_without_its_markers_is_refused(folder, root, text):
    (root / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"README\.md: expected <!-- figures"):
        report.write(folder, root)
    assert (root / "README.md").read_text() == text and not (root / report.PAGE).exists()


def test_a_headline_takes_the_largest_case_that_the_usual_way_can_do():
    larger = dataclasses.replace(ALL_KEYS, anchors=4096)
    rows = [timed(larger, "pico_fast", 4.0), Row(larger, "eager", why_not="out of memory")]
    found = headlines.speed(headlines.HEADLINES[0], Results(CPU, rows=rows + all_keys()))
    assert found["case"] == figures.place(ALL_KEYS) and found["pico_fast"].startswith("8.0 x")
    rows.append(timed(larger, "two products", 3.0))
    found = headlines.speed(headlines.HEADLINES[0], Results(CPU, rows=rows))
    assert found["pico_fast"] == "0.75 x its two bare matrix products"


def test_gpu_is_said_to_be_missing_only_where_it_is(folder, root):
    report.write(folder, root)
    assert NOT_MEASURED in (root / report.PAGE).read_text()
    assert NOT_MEASURED in (root / "README.md").read_text()
    made_up(GPU).write(folder / file_name(GPU))
    report.write(folder, root)
    for name in (report.PAGE, "README.md"):
        text = (root / name).read_text()
        assert "not measured yet" not in text and "NVIDIA H100" in text
    assert len(list((root / report.PLOTS).glob("*.svg"))) == 6


def test_second_run_writes_the_same_bytes(folder, root):
    written = report.write(folder, root)
    first = contents(root)
    time = first[f"{report.PLOTS}/cpu-2-threads-time-by-number-of-keys.svg"].decode()
    assert all(word in time for word in ("pico_fast", "eager", "its products alone, float32"))
    assert set(written) <= set(first) and sum(name.endswith(".svg") for name in written) == 3
    report.write(folder, root)
    assert contents(root) == first
    assert report.check(folder, root) == []
    assert contents(root) == first


def test_check_names_a_changed_figure(folder, root):
    report.write(folder, root)
    changed = made_up(CPU)
    eager = figures.run_of(changed.rows, "eager")
    eager.seconds = around(9.0)
    changed.write(folder / file_name(CPU))
    before = contents(root)
    assert report.check(folder, root) == [report.PAGE, "README.md"]
    assert contents(root) == before


def test_check_names_plots(folder, root, capsys, monkeypatch):
    report.write(folder, root)
    time, memory, _ = sorted((root / report.PLOTS).glob("*.svg"), reverse=True)
    time.write_text(time.read_text().replace("keys", "locks"))
    memory.rename(memory.with_name("retired.svg"))
    names = [f"{report.PLOTS}/{path.name}" for path in (time, memory, Path("retired.svg"))]
    assert report.check(folder, root) == names
    assert capsys.readouterr().out == ""
    # another matplotlib writes other bytes, but the plots have to be there all the same
    monkeypatch.setattr(plots, "version", lambda: "0.1")
    assert report.check(folder, root) == names[1:]
    assert "plots skipped" in capsys.readouterr().out
    report.write(folder, root)
    assert not (root / report.PLOTS / "retired.svg").exists()


def test_plots_of_nothing_are_left_out(root, tmp_path):
    Results(CPU, rows=all_keys()).write(tmp_path / "few" / "cpu.json")
    assert report.write(tmp_path / "few", root) == [report.PAGE, "README.md"]
    text = (root / report.PAGE).read_text()
    assert "![" not in text and "Ceilings" not in text and "### Counts" not in text


def test_memory_beside_times_is_drawn_too():
    case = Case("contrast, by number of keys", "COCO-Stuff", 1000, 4096)
    rows = [Row(case, "pico_fast", [0.1], peak_bytes=10**6)]
    assert set(plots.draw(Results(GPU, rows=rows))) == {plots.TIME, plots.MEMORY}


def test_file_of_another_format_is_named(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected result files"):
        report.write(tmp_path / "empty", root)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.json").write_text('{"machine": {}, "rows": []}')
    with pytest.raises(ValueError, match=r"old\.json: no result file"):
        report.write(tmp_path / "old", root)


def test_command_writes_and_checks(folder, root, monkeypatch, capsys):
    write, check = report.write, report.check
    monkeypatch.setattr(report, "write", lambda: write(folder, root))
    monkeypatch.setattr(report, "check", lambda: check(folder, root))
    assert report.main(["--check"]) == 1
    assert f"{report.PAGE} is not what bench/results says" in capsys.readouterr().out
    assert report.main([]) == 0 and report.main(["--check"]) == 0


def test_table_leaves_out_empty_columns():
    rows = [{"run": "a", "median": "", "bar": ""}, {"run": "b", "median": "1 s", "bar": ""}]
    assert tables.table(rows) == ["| run | median |", "|---|---:|", "| a |  |", "| b | 1 s |"]
