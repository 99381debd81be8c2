"""Models of mmsegmentation: each trains with PiCo."""

import json

import pytest
import training
from mmseg_cases import CASES
from models_table import DOCS

MEASURED = json.loads((DOCS / "models.json").read_text())["models"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_model_trains_and_detaches(case):
    training.check(case)


def test_the_page_has_every_model():
    for case in CASES:
        row = MEASURED[case.key]
        assert (row["tap"], row["stride"]) == (case.tap, case.stride), case.key
