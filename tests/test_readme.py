"""What the README shows is true: its example runs, its commands exist, its table of options fits."""

import inspect
import re
from pathlib import Path

import pico_fast

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def examples(text: str) -> list[str]:
    """The code of a page that says it is run."""
    return re.findall(r"<!-- run by .*? -->\n```python\n(.*?)```", text, re.DOTALL)


def test_the_examples_run():
    found = examples(README)
    assert len(found) == 2
    for example in found:
        names: dict = {}
        exec(compile(example, "README.md", "exec"), names)
        assert names["loss"].isfinite()
        assert names["criterion"].bank.pixel_count.sum() > 0
        head = names["head"] if "head" in names else names["tap"].head
        assert head[0].weight.grad is not None


def test_picks_beyond_the_pool_are_as_few_as_the_page_says():
    page = (ROOT / "docs" / "sampling.md").read_text()
    (example,) = examples(page)
    names: dict = {}
    exec(compile(example, "sampling.md", "exec"), names)
    assert 0.5 * names["limit"] < names["share"] < 1.1 * names["limit"]  # by chance a little above
    share, limit = (f"{100 * names[name]:.1f} %" for name in ("share", "limit"))
    (row,) = re.findall(r"^\| 64 \| ([^|]*) \| [^|]* \| ([^|]*) \|", page, re.MULTILINE)
    assert row == (limit, share)


def test_every_command_is_one_that_exists():
    makefile = (ROOT / "Makefile").read_text()
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for target in re.findall(r"\bmake ([a-z-]+)", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        for path in re.findall(r"`((?:pico_fast|kernels|csrc|tests|bench|examples)/[\w./]*)`", text):
            assert (ROOT / path).exists(), path
        for path in re.findall(r"\]\((\w[\w/.]*)\)", text):
            assert (ROOT / path).exists(), path
    script = (ROOT / "examples" / "train_segmentation.py").read_text()
    for option in re.findall(r"train_segmentation\.py (.*)", README):
        for flag in re.findall(r"--[a-z-]+", option):
            assert f'"{flag}"' in script, flag


def test_the_options_have_the_defaults_of_the_table():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(pico_fast.PiCoLoss).parameters.items()
    }
    table = README.split("## Options")[1].split("## How the loss")[0]
    seen = 0
    for names, shown in re.findall(r"^\| (`[^|]*`) \| ([^|]*) \|", table, re.MULTILINE):
        shown = [value.strip(' `"').replace(",", "") for value in re.split(r", (?=\d)", shown)]
        for name, value in zip(re.findall(r"`(\w+)`", names), shown, strict=False):
            if name in defaults:
                seen += 1
                assert str(defaults[name]) == value.split(" ")[0], name
    assert seen >= 12
    assert 171 * 11_000 * 256 * 2 == 963_072_000
