"""Presets: the data sets' numbers, and the criterion made from them."""

import pytest

import pico_fast
from pico_fast import info
from pico_fast.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_its_criterion(name):
    found = preset(name)
    # the paper's bank is too large for a test: its sizes are options like any other
    small = {"pixel_queue_size": 4, "region_queue_size": 2}
    criterion = pico_fast.PiCoLoss.from_preset(name, temperature=0.07, **small)
    assert criterion.num_classes == found.num_classes
    assert criterion.ignore_index == found.ignore_index
    assert criterion.temperature == 0.07
    assert criterion.bank.storage.shape == (found.num_classes, 6, 256)


def test_queues_are_those_of_the_paper():
    for found in PRESETS.values():
        if found.num_classes < 50:  # ten pixels and one region of every training image
            assert found.pixel_queue_size == 10 * found.train_images
            assert found.region_queue_size == found.train_images
        else:
            assert found.pixel_queue_size == 10_000
    criterion = pico_fast.PiCoLoss.from_preset("camvid")
    assert criterion.bank.storage.shape == (11, 3_670 + 367, 256)
    assert criterion.bank.storage.nbytes == preset("camvid").memory()


def test_info_prints_the_memory():
    assert "coco_stuff" in info.report()
    assert "918 MiB" in info.report()


def test_wrong_names():
    with pytest.raises(ValueError, match=r"name: expected one of .*'ade20k'.* got 'kitti'"):
        pico_fast.PiCoLoss.from_preset("kitti")
    with pytest.raises(TypeError, match="name: expected one of"):
        pico_fast.PiCoLoss.from_preset(3)
    with pytest.raises(ValueError, match="temperature"):
        pico_fast.PiCoLoss.from_preset("camvid", temperature=0)
