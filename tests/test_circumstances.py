"""What else may happen around a step: inputs changed in place, threads, copies, odd integers."""

import copy
import pickle
import threading

import pytest
import torch
from test_misuse import (
    IMAGES,
    KEY_LABELS,
    KEYS,
    LABELS,
    MAP,
    ROWS,
    SCORES,
    criterion,
    same,
    value_and_gradient,
)
from torch import func, nn
from torch.nn.functional import normalize

import pico_fast


def inputs_of(call):
    """One more tensor that the backward could need: keys, labels, the bank."""
    if call == "keys":
        keys = KEYS.clone().requires_grad_()
        return keys, lambda x, t: pico_fast.contrast(x, LABELS, t * 1, KEY_LABELS)
    if call == "labels of keys that want a gradient":
        keys = KEYS.clone().requires_grad_()
        return KEY_LABELS.clone(), lambda x, t: pico_fast.contrast(x, LABELS, keys, t)
    if call == "labels":
        return LABELS.clone(), lambda x, t: pico_fast.contrast(x, t, KEYS, KEY_LABELS)
    if call == "labels in batch":
        return LABELS.clone(), lambda x, t: pico_fast.contrast(x, t)
    if call == "map":
        return MAP.clone(), lambda x, t: pico_fast.region_pool(x, t, 4)[0].square().sum()
    if call == "map of a criterion":
        return MAP.clone(), lambda x, t: criterion()(x, t, SCORES)
    made = criterion()
    return made.bank.storage, lambda x, t: made(x, MAP, SCORES)


@pytest.mark.parametrize(
    "which",
    (
        "keys",
        "labels of keys that want a gradient",
        "labels",
        "labels in batch",
        "map",
        "map of a criterion",
        "bank",
    ),
)
def test_what_is_changed_before_the_backward_leaves_no_trace_in_it(which, figures):
    x = (IMAGES if which in ("map", "map of a criterion", "bank") else ROWS).clone()
    gradients = []
    for change in (False, True):
        x = x.detach().requires_grad_()
        tensor, function = inputs_of(which)
        value = function(x, tensor)
        if change:
            with torch.no_grad():
                tensor.zero_()
        gradients.append(torch.autograd.grad(value, x)[0])
    same(gradients[1:], gradients[:1])
    figures.add("misuse", "circumstances")


def test_keys_with_a_gradient_that_are_changed_are_noticed():
    used = KEYS.clone().requires_grad_() * 1
    loss = pico_fast.contrast(ROWS, LABELS, used, KEY_LABELS)
    with torch.no_grad():
        used.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_anchors_in_batch_that_are_changed_are_noticed():
    x = ROWS.clone().requires_grad_()
    used = x * 1
    loss = pico_fast.contrast(used, LABELS)
    with torch.no_grad():
        used.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def in_threads(n, work):
    results, errors = [None] * n, []

    def one(i):
        try:
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results


def training(seed):
    """Losses and the bank of some steps on data of this seed."""
    g = torch.Generator().manual_seed(seed)
    made = pico_fast.PiCoLoss(4, 16, pixel_queue_size=20, region_queue_size=4, max_samples=40)
    losses = []
    for _ in range(4):
        x = normalize(torch.randn(2, 16, 6, 6, generator=g), dim=1).requires_grad_()
        labels = torch.randint(-1, 4, (2, 6, 6), generator=g)
        loss = made(x, labels)
        loss.backward()
        losses += [loss.detach(), x.grad]
    return losses, made.bank.storage


def test_threads_with_a_criterion_each_do_not_meet(figures):
    expected = [training(seed) for seed in range(4)]
    for (losses, storage), (theirs, other) in zip(in_threads(4, training), expected, strict=True):
        same(losses, theirs)
        assert torch.equal(storage, other)
    figures.add("misuse", "circumstances")


def test_a_backward_in_another_thread():
    x = IMAGES.clone().requires_grad_()
    loss = criterion()(x, MAP, SCORES)
    in_threads(1, lambda _: loss.backward())
    same([x.grad], [value_and_gradient("criterion semi_hard")[1]])


@pytest.mark.parametrize("way", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies_go_their_own_way(way):
    made = criterion()
    twin = way(made)
    same([twin(IMAGES, MAP, SCORES)], [made(IMAGES, MAP, SCORES)])
    twin(IMAGES, MAP, SCORES)
    assert int(twin.step) == int(made.step) + 1
    assert int(twin.bank.step) == int(made.bank.step) + 1


@pytest.mark.parametrize("way", ("parameter", "functional", "shared memory", "half"))
def test_other_ways_to_call(way):
    made, expected = criterion(), criterion()(IMAGES, MAP, SCORES)
    if way == "parameter":
        found = made(nn.Parameter(IMAGES), MAP, SCORES)
    elif way == "functional":
        found = func.functional_call(made, {}, (IMAGES, MAP, SCORES))
    elif way == "shared memory":
        found = made.share_memory()(IMAGES, MAP, SCORES)
    else:
        found = made.half()(IMAGES, MAP, SCORES)
    same([found.detach()], [expected])


def test_labels_as_large_as_integers_get():
    plain = pico_fast.contrast(ROWS, LABELS, KEYS, KEY_LABELS)
    for far in (2**31, 2**40, 2**62):
        moved = KEY_LABELS.where(KEY_LABELS < 0, KEY_LABELS + far)
        same([pico_fast.contrast(ROWS, LABELS + far, KEYS, moved)], [plain])
    lowest = KEY_LABELS.where(KEY_LABELS >= 0, -(2**63))
    same([pico_fast.contrast(ROWS, LABELS, KEYS, lowest)], [plain])


@pytest.mark.parametrize("value", (4, 2**31, 2**63, 2**64 - 1))
def test_unsigned_labels_beyond_the_classes_are_no_negative_ones(value):
    wide = torch.zeros(2, 6, 6, dtype=torch.int64)
    wide[0, 0, 0] = value - 2**64 if value >= 2**63 else value
    wide = wide.view(torch.uint64)
    with pytest.raises(ValueError, match=r"^labels: expected values below num_classes = 4"):
        pico_fast.region_pool(IMAGES, wide, 4)


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
def test_quantized_numbers_are_no_labels():
    quantized = torch.quantize_per_tensor(LABELS.float(), 1.0, 0, torch.quint8)
    with pytest.raises(TypeError, match=r"^anchor_labels: expected"):
        pico_fast.contrast(ROWS, quantized)


def test_a_criterion_on_another_device_is_named():
    with pytest.raises(ValueError, match=r"^embeddings: expected device meta"):
        criterion().to("meta")(IMAGES, MAP, SCORES)


def test_labels_that_require_a_gradient_are_no_labels():
    wanting = MAP.float().requires_grad_()
    with pytest.raises(TypeError, match=r"^labels: expected"):
        criterion()(IMAGES, wanting, SCORES)
