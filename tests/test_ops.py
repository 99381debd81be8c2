"""The package's ops: each keeps the rules of torch.library, and reads nothing back inside."""

import contextlib

import pytest
import torch

from pico_fast import contrast_any, contrast_selected, picked, pixels, selection, synthesis
from pico_fast.finite import _labels_of_finite
from pico_fast.labels import _on_grid

SAMPLINGS = ("all", "random", "hardest", "semi_hard")


def rows(dtype=torch.float32):
    anchors, keys = torch.randn(7, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    anchor_labels = torch.tensor([0, 0, 1, 1, 2, -1, 3])
    return anchors, anchor_labels, keys, torch.arange(11) % 4 - (torch.arange(11) == 5).long() * 9


def op_calls(name, keyed):
    """Arguments of one op, drawn from a run of those before it."""
    ops = torch.ops.pico_fast
    anchors, anchor_labels, keys, key_labels = rows()
    if not keyed:
        keys = key_labels = None
    pairs, seed = (anchors, anchor_labels, keys, key_labels), torch.tensor(3)
    if name == "labels_on_grid":
        return (torch.randint(0, 4, (2, 6, 8)), 3, 5, 4, 255)
    if name == "gather_pixels":
        return (torch.randn(2, 5, 4, 3), torch.randperm(24)[:7])
    if name == "labels_of_finite":
        return ("anchors", anchors, anchor_labels, keyed)
    if name == "select_keys":
        return (*pairs, "semi_hard", 3, 4, 0.5, seed)
    if name == "pick_keys":
        similarity = anchors @ (keys if keyed else anchors).T
        key_labels = key_labels if keyed else anchor_labels
        return (similarity, anchor_labels, key_labels, False, 4, 0.5, seed, 6, 0, not keyed)
    if name == "permute_ranks":
        n = torch.tensor([[11], [200]])
        return (torch.arange(11).repeat(2, 1), n, seed, 6, torch.arange(2)[:, None])
    chosen = ops.select_keys(*pairs, "hardest", 3, 4, 0.5, seed)
    if name == "rank_keys":
        return (anchors, keys if keyed else anchors, chosen[1], False)
    if name == "weighted_rows":
        return (keys if keyed else anchors, chosen[1], torch.rand(7, 4))
    mixing = (anchors, keys, chosen[1], 3, 2, 0.1, seed)
    if name == "mix_negatives":
        return mixing
    mixed = ops.mix_negatives(*mixing)
    of_all, of_chosen = (*pairs, *mixed, 0.1, True), (anchors, keys, *chosen, *mixed, 0.1, True)
    if name == "contrast_all":
        return of_all
    if name == "contrast_selected":
        return of_chosen
    # a bank of 3 classes x (3 + 1) slots, not all in use
    bank, first = torch.randn(12, anchors.shape[1]), torch.arange(0, 12, 4)
    segments = torch.stack([first, first * 0 + 2, first + 3, first * 0 + 1], 1).view(3, 2, 2)
    half = (anchors, anchor_labels.clamp(max=2), bank, segments)
    if name in ("contrast_negatives", "contrast_positives"):
        return (*half, *([torch.randn(7)] if "pos" in name else []), 0.1, keyed)
    grad = torch.randn(7)
    if name == "contrast_all_keys_grad":
        _, lse, count, *_ = ops.contrast_all(*of_all)
        return (grad, *pairs, lse, count, 0.1)
    if name == "contrast_selected_keys_grad":
        lse = ops.contrast_selected(*of_chosen)[1]
        return (grad, anchors, *chosen, lse, 0.1, 11 if keyed else 7)
    raise KeyError(f"{name}: an op that this table does not know")


OPS = sorted(
    name.removeprefix("pico_fast::").partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("pico_fast::") and "region_pool" not in name  # those have their own page
)


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_every_op_keeps_the_rules(name, keyed):
    torch.library.opcheck(getattr(torch.ops.pico_fast, name).default, op_calls(name, keyed))


# what runs inside the ops on a device without compiled kernels
INSIDE = {
    "labels_on_grid": _on_grid,
    "labels_of_finite": _labels_of_finite,
    "select_keys": selection.select_any,
    "pick_keys": picked.pick_torch,
    "permute_ranks": selection.permute_torch,
    "rank_keys": picked.rank_torch,
    "weighted_rows": picked.rows_torch,
    "mix_negatives": synthesis.mix_any,
    "contrast_all": contrast_any.contrast_all,
    "contrast_all_keys_grad": contrast_any.contrast_all_keys_grad,
    "contrast_negatives": contrast_any.contrast_negatives,
    "contrast_positives": contrast_any.contrast_positives,
    "gather_pixels": pixels.gather_torch,
    "contrast_selected": contrast_selected.contrast_selected,
    "contrast_selected_keys_grad": contrast_selected.contrast_selected_keys_grad,
}


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_no_op_reads_anything_back_inside(name, keyed, monkeypatch):
    # autocast knows no device without values
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    args = op_calls(name, keyed)
    expected = getattr(torch.ops.pico_fast, name)(*args)
    without = [a.to("meta") if torch.is_tensor(a) else a for a in args]
    for sampling in SAMPLINGS if name == "select_keys" else (None,):
        if sampling is not None:
            without[4] = sampling
        found = INSIDE[name](*without)
        one = torch.is_tensor(found)
        for mine, real in [(found, expected)] if one else zip(found, expected, strict=True):
            assert mine.is_meta and mine.dtype == real.dtype
            assert mine.shape == real.shape or sampling == "all"  # as wide as there are keys
