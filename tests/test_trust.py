"""docs/trust.md says what docs/trust.json holds, and every promise has a test and a figure."""

import json
from pathlib import Path

import pytest

trust = pytest.importorskip("trust", reason="needs Triton")
TESTS = Path(__file__).parent
ALL = [promise for promises in trust.PROMISES.values() for promise in promises]


@pytest.fixture(scope="module")
def found():
    return json.loads(trust.FIGURES.read_text())


def test_the_page_is_that_of_the_figures(found):
    assert trust.PAGE.read_text() == trust.page(found)


@pytest.mark.parametrize("promise", ALL, ids=[promise.figures for promise in ALL])
def test_a_promise_has_tests_and_figures(promise, found):
    for name in promise.tests.split():
        assert (TESTS / f"test_{name}.py").is_file()
    assert found["figures"][promise.figures]


def test_every_figure_belongs_to_a_promise(found):
    known = {promise.figures for promise in ALL}
    assert set(found["figures"]) - known <= {"passed"}


def test_nothing_was_lost_and_nothing_found(found):
    figures = found["figures"]
    assert figures["interrupted"]["entries lost"] == 0
    assert figures["sanitizers"]["findings"] == 0
    assert figures["budget"]["worst error, as a share of its budget"] <= 1
    assert found["seconds"] <= 3600


def test_numbers_are_written_for_people():
    assert trust.written("steps", 10240) == "10,240 steps"
    assert trust.written("worst error", 0.58634) == "worst error: 0.59"
