"""docs/models.md says what was measured, names places that `attach` knows, and its plain loop runs."""

# ruff: noqa: E402, for these are scripts: their folders have to be found before they are

import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "integrations"), str(ROOT / "examples")]

import models_table
import plain_loop

import pico_fast
from pico_fast.attach import KNOWN

PAGE = (ROOT / "docs" / "models.md").read_text()
RESULTS = json.loads((ROOT / "docs" / "models.json").read_text())


def test_the_table_is_that_of_the_results():
    assert models_table.page(PAGE, RESULTS) == PAGE
    assert PAGE.count(models_table.BEGIN) == PAGE.count(models_table.END) == 1


def test_every_place_that_is_known_has_a_model_that_trains():
    packages = {library: library for library in models_table.LIBRARIES} | {"mmsegmentation": "mmseg"}
    trained = {(packages[row["library"]], row["tap"]) for row in RESULTS["models"].values()}
    known = {(place.library.partition(".")[0], place.path) for place in KNOWN}
    assert trained == known


def test_the_sizes_of_the_page_are_those_of_the_results():
    settings = RESULTS["settings"]
    images, _, height, width = settings["images"]
    bank = settings["pixel_queue_size"] + settings["region_queue_size"]
    for words in (
        f"{settings['rounds']} rounds",
        f"{images} images of {height} x {width}",
        f"{settings['embedding_dim']} channels",
        f"{settings['max_samples']} anchors",
        f"{settings['num_positives']} positives and {settings['num_negatives']} negatives",
        f'`sampling="{settings["sampling"]}"`',
        f"{settings['classes']} x {bank} entries",
    ):
        assert words in " ".join(PAGE.split()), words
    assert settings["torch"].endswith("+cpu") and settings["threads"] == 1


def test_what_the_page_names_is_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", PAGE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\b((?:examples|tests)/[\w./]*\w)", PAGE):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("command", re.findall(r"^    python (examples/.*)$", PAGE, re.MULTILINE))
def test_trainers_are_short(command):
    for path in re.findall(r"examples/\w+\.py", command):
        assert len((ROOT / path).read_text().splitlines()) <= 80, path


def test_the_three_lines_train():
    (lines,) = re.findall(r"^```python\n(tap = .*?)```", PAGE, re.MULTILINE | re.DOTALL)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 4, 1), torch.nn.Conv2d(16, 19, 1))
    names = {
        "pico_fast": pico_fast,
        "model": model,
        "images": torch.randn(2, 3, 32, 32),
        "labels": torch.randint(0, 19, (2, 32, 32)),
    }
    # a model that is not known needs its path
    exec(lines.replace("attach(model,", 'attach(model, "1",'), names)
    names["loss"].backward()
    assert names["joint"].criterion.bank.pixel_count.sum() > 0


def test_the_plain_loop(capsys):
    threads = torch.get_num_threads()
    plain_loop.main(["--steps", "20", "--device", "cpu"])
    torch.set_num_threads(threads)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 2 and losses[1] < losses[0]
