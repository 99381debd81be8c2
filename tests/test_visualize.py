"""Pictures and scalars: what they show is what is there."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import pico_fast
from pico_fast import visualize


def batch(classes=4, size=16):
    """Images, embeddings around a centre of each class, labels with a row that is left out."""
    labels = torch.arange(classes).repeat_interleave(size // classes).expand(2, size, size).clone()
    centres = torch.eye(8)[:classes]
    embeddings = centres[labels].permute(0, 3, 1, 2) + 0.1 * torch.randn(2, 8, size, size)
    labels[:, 0] = 255
    return torch.rand(2, 3, 4 * size, 4 * size), normalize(embeddings, dim=1), labels


def test_pca_finds_the_two_directions():
    rows = torch.zeros(200, 6)
    rows[:, 4], rows[:, 1] = 5 * torch.randn(200), 2 * torch.randn(200)
    found = visualize.project(rows)
    centred = rows - rows.mean(0)
    torch.testing.assert_close(found[:, 0].abs(), centred[:, 4].abs(), atol=0.5, rtol=0)
    assert torch.equal(visualize.project(rows), found)
    distances = torch.cdist(found, found)
    torch.testing.assert_close(distances, torch.cdist(rows, rows), atol=1e-2, rtol=1e-3)


def test_embeddings_by_class():
    _, embeddings, labels = batch()
    figure = visualize.embeddings_by_class(embeddings, labels, list("abcd"), per_class=30)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list("abcd")
    assert all(len(points.get_offsets()) == 30 for points in axes.collections)
    coarse = visualize.embeddings_by_class(embeddings, labels[:, ::2, ::2])
    assert len(coarse.axes[0].collections) == 4
    with pytest.raises(ValueError, match="labels: expected two pixels"):
        visualize.embeddings_by_class(embeddings, torch.full_like(labels, 255))
    with pytest.raises(ValueError, match="method: expected one of"):
        visualize.project(torch.randn(4, 4), "lda")
    with pytest.raises(ValueError, match="rows: expected two rows"):
        visualize.project(torch.randn(1, 4))


def test_class_similarity_of_a_batch_and_of_a_bank():
    _, embeddings, labels = batch()
    _, matrix = visualize.class_similarity(embeddings, labels)
    bank = pico_fast.MemoryBank(5, 8, 200, 4, pixels_per_image=200, dtype=torch.float32)
    bank.enqueue(embeddings, labels)
    _, of_bank = visualize.class_similarity(bank, class_names=list("abcde"))
    assert of_bank.isnan().sum() == 9  # a class that is not there
    torch.testing.assert_close(of_bank[:4, :4], matrix, atol=0.05, rtol=0)
    rows = embeddings.movedim(1, 3)[labels == 1]
    assert math.isclose(matrix[1, 1], rows.mean(0).norm(), abs_tol=1e-5)
    other = embeddings.movedim(1, 3)[labels == 2].mean(0)
    want = normalize(rows.mean(0), dim=0) @ normalize(other, dim=0)
    assert math.isclose(matrix[1, 2], want, abs_tol=1e-5)


def test_bank_fill():
    bank = pico_fast.MemoryBank(3, 8, 10, 5, pixels_per_image=5)
    bank.enqueue(torch.randn(1, 8, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64))
    heights = [bar.get_height() for bar in visualize.bank_fill(bank).axes[0].patches]
    assert heights == pytest.approx([50, 0, 0, 20, 0, 0])
    with pytest.raises(TypeError, match="bank: expected a MemoryBank"):
        visualize.bank_fill(torch.zeros(3))


def test_hardest_negatives_are_the_most_similar_of_other_classes():
    images, embeddings, labels = batch()
    embeddings[1, :, 9, 13] = embeddings[0, :, 5, 1]  # a pixel of class 3 that looks like one of 0
    figure, places = visualize.hardest_negatives(images, embeddings, labels, (0, 5, 1), 5, 16)
    assert places[0].tolist() == [1, 9, 13]
    assert len(figure.axes) == 6 and len(places) == 5
    assert all(labels[tuple(place)] not in (0, 255) for place in places.tolist())
    with pytest.raises(ValueError, match="pixel: expected a pixel with a class"):
        visualize.hardest_negatives(images, embeddings, labels, (0, 0, 0))
    with pytest.raises(ValueError, match="pixel: expected an integer"):
        visualize.hardest_negatives(images, embeddings, labels, (0, 99, 0))


class Scalars:
    """What a SummaryWriter would have written."""

    def __init__(self):
        self.found = {}

    def add_scalar(self, name, value, step):
        self.found[name] = (value, step)


def test_stats_are_logged():
    criterion = pico_fast.PiCoLoss(4, 8, pixel_queue_size=20, region_queue_size=2)
    _, embeddings, labels = batch()
    for _ in range(2):
        criterion(embeddings, labels)
    writer = Scalars()
    visualize.log_stats(writer, criterion)
    assert writer.found["pico/positive_similarity"] == (
        pytest.approx(float(criterion.stats["positive_similarity"])),
        2,
    )
    assert {"pico/pixel_fill", "pico/hard_anchors"} <= set(writer.found)
    with pytest.raises(TypeError, match="writer: expected one with add_scalar"):
        visualize.log_stats(None, criterion)
    with pytest.raises(TypeError, match="criterion: expected a PiCoLoss"):
        visualize.log_stats(writer, torch.nn.ReLU())
