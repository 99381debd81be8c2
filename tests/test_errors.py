"""Wrong calls: each raises an error that names the argument, before anything is changed."""

import copy
import math

import pytest
import torch
from torch import nn

import pico_fast

torch.manual_seed(0)
ROWS = torch.randn(4, 8)
LABELS = torch.tensor([0, 1, 0, -1])
IMAGES = torch.randn(2, 8, 5, 5)
MAP = torch.randint(0, 3, (2, 5, 5))
SCORES = torch.randn(2, 3, 5, 5)
META = {name: value.to("meta") for name, value in (("rows", ROWS), ("map", MAP))}
NO_QUEUE = torch.randn(3, 4, 8).index_fill_(0, torch.tensor(1), math.nan)
TOO_HIGH = MAP.clone().index_fill_(2, torch.tensor(0), 3)


def criterion():
    return pico_fast.PiCoLoss(3, 8, pixel_queue_size=6, region_queue_size=3, max_samples=12)


def attach(model, **words):
    # to a copy: the next call is to find the model without a tap
    return pico_fast.attach(copy.deepcopy(model), **words)


# a correct call of everything public; a wrong one replaces one argument
CALLS = {
    "attach": (
        attach,
        {"model": nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)), "tap": "2"},
    ),
    "contrast": (pico_fast.contrast, {"anchors": ROWS, "anchor_labels": LABELS}),
    "contrast with keys": (
        pico_fast.contrast,
        {"anchors": ROWS, "anchor_labels": LABELS, "keys": ROWS, "key_labels": LABELS},
    ),
    "select_keys": (
        pico_fast.select_keys,
        {"anchors": ROWS, "anchor_labels": LABELS, "keys": ROWS, "key_labels": LABELS},
    ),
    "region_pool": (
        pico_fast.region_pool,
        {"features": IMAGES, "labels": MAP, "num_classes": 3},
    ),
    "sample_anchors": (
        pico_fast.sample_anchors,
        {"labels": MAP, "predictions": SCORES, "num_classes": 3},
    ),
    "Synthesis": (pico_fast.Synthesis, {}),
    "ProjectionHead": (pico_fast.ProjectionHead, {"in_channels": 4}),
    "MemoryBank": (
        pico_fast.MemoryBank,
        {"num_classes": 3, "embedding_dim": 8, "pixel_queue_size": 6, "region_queue_size": 3},
    ),
    "PiCoLoss": (pico_fast.PiCoLoss, {"num_classes": 3, "pixel_queue_size": 1}),
    "PixelContrastLoss": (pico_fast.PixelContrastLoss, {}),
    "JointLoss": (pico_fast.JointLoss, {"criterion": pico_fast.PixelContrastLoss()}),
}
METHODS = {
    "bank.enqueue": (
        lambda: pico_fast.MemoryBank(3, 8, 6, 3),
        lambda bank, **words: bank.enqueue(**words),
        {"embeddings": IMAGES, "labels": MAP},
    ),
    "criterion": (
        criterion,
        lambda module, **words: module(**words),
        {"embeddings": IMAGES, "labels": MAP, "logits": SCORES},
    ),
    "joint": (
        lambda: pico_fast.JointLoss(criterion()),
        lambda module, **words: module(**words),
        {"logits": SCORES, "embeddings": IMAGES, "labels": MAP},
    ),
    "drop-in": (
        lambda: pico_fast.PixelContrastLoss(num_classes=3, max_views=2),
        lambda module, **words: module(**words),
        {"feats": IMAGES, "labels": MAP, "predict": SCORES, "queue": torch.randn(3, 4, 8)},
    ),
}

NO_TEMPERATURE = (0.0, -1, math.nan, math.inf, True, "0.1", None, torch.tensor(0.1))
NO_COUNT = (0, -1, 1.5, True, "4", None)
NO_SEED = (1.5, "0", None, 2**63, True)
NO_ROWS = (
    None,
    [[1.0]],
    ROWS[0],
    ROWS[None],
    ROWS.long(),
    ROWS.to(torch.complex64),
    ROWS.to_sparse(),
    ROWS > 0,
    ROWS.to(torch.float8_e4m3fn),
)
NO_ROW_LABELS = (
    [0, 1, 0, -1],
    LABELS.float(),
    LABELS > 0,
    LABELS[:3],
    LABELS[:, None],
    LABELS.to("meta"),
    LABELS.to_sparse(),
)
NO_IMAGES = (
    None,
    "images",
    IMAGES[0],
    IMAGES.long(),
    IMAGES.to(torch.complex64),
    IMAGES.to_sparse(),
)
NO_MAP = (None, MAP.tolist(), MAP.float(), MAP > 0, MAP[0], MAP.to_sparse(), TOO_HIGH)
NO_PREDICTIONS = (
    "scores",
    SCORES[:, :2],
    SCORES[:1],
    SCORES[0, 0],
    MAP > 0,
    MAP[None],
    SCORES.to(torch.complex64),
    SCORES.to_sparse(),
    SCORES.to("meta"),
    SCORES[..., :0],
)
NO_SELECTION = {
    "sampling": ("hard", "ALL", None, 3),
    "positives": ("hard", "bounded", "ALL", 3, True, ("all",)),
    "num_positives": NO_COUNT,
    "num_negatives": NO_COUNT,
    "hard_fraction": (0.0, -0.1, 1.01, math.nan, True, "0.1"),
    "impl": ("triton", "Reference", 3, True),
}
NO_BANK = {
    "num_classes": (*NO_COUNT, 70_000),
    "embedding_dim": NO_COUNT,
    "pixel_queue_size": (-1, 1.5, True, "10", None),
    "region_queue_size": (-1, 1.5, True, "10", None),
    "pixels_per_image": NO_COUNT,
    "ignore_index": (0, 2, 1.0, "255", None, True),
    "seed": (*NO_SEED, torch.tensor(0)),
}
NO_PAIRS = {
    "anchors": (*NO_ROWS, ROWS[:, :0]),
    "anchor_labels": NO_ROW_LABELS,
    "seed": (*NO_SEED, torch.tensor(0.0), torch.tensor([0]), torch.tensor(0, device="meta")),
}
NO_KEYS = {"keys": (*NO_ROWS[1:], ROWS[:, :7], META["rows"]), "key_labels": NO_ROW_LABELS}
NO_RANKS = {
    "placement": ("everywhere", "Local", None, 1),
    "process_group": ("world", 0),
    "max_images": (0, -1, 2.0, True, "2"),
}
WRONG = {
    "attach": {
        "model": (None, "model", nn.Sequential),
        "tap": (None, "", "3", "0:sideways", 3),
        "embedding_dim": NO_COUNT,
        "in_channels": NO_COUNT[:-1],
        "grid": (4, (4,), [4, 4], (0, 4), (4, 1.5), "4x4"),
    },
    "contrast": NO_PAIRS
    | NO_SELECTION
    | {
        "temperature": NO_TEMPERATURE,
        "reduction": ("avg", None, 1),
        "synthesis": (3, "both", {"pool": 3}, (1, 2, 3), pico_fast.Synthesis),
        "key_labels": (LABELS,),
    },
    "contrast with keys": NO_KEYS | {"key_labels": (None, *NO_ROW_LABELS)},
    "select_keys": NO_PAIRS | NO_KEYS | NO_SELECTION,
    "region_pool": {
        "features": NO_IMAGES,
        "labels": (*NO_MAP, MAP[:1], MAP[:, :4], MAP[..., :4], META["map"]),
        "num_classes": NO_COUNT,
        "ignore_index": (0, 2, 1.0, "255"),
        "impl": ("fast", 3),
    },
    "sample_anchors": {
        "labels": NO_MAP,
        "predictions": (*NO_PREDICTIONS, SCORES[..., :4], MAP[:, :4]),
        "max_samples": NO_COUNT,
        "max_views": NO_COUNT,
        "min_pixels": NO_COUNT,
        "num_classes": NO_COUNT,
        "ignore_index": (1, "255"),
        "seed": (*NO_SEED, torch.tensor(0.0)),
        "easy": ("hard", None, 1),
        "impl": ("fast", 3),
    },
    "Synthesis": {
        "negative_negative": (-1, 0.5, True, None),
        "negative_anchor": (-1, 0.5, "256"),
        "pool": NO_COUNT,
    },
    "ProjectionHead": {"in_channels": NO_COUNT, "embedding_dim": NO_COUNT},
    "MemoryBank": NO_BANK | NO_RANKS | {"dtype": (torch.int8, "float32", None), "impl": ("fast", 3)},
    "PiCoLoss": NO_SELECTION
    | NO_BANK
    | NO_RANKS
    | {
        "temperature": NO_TEMPERATURE,
        "base_temperature": [t for t in NO_TEMPERATURE if t is not None],
        "max_samples": NO_COUNT,
        "max_views": NO_COUNT,
        "min_pixels": NO_COUNT,
        "synthesis": (3, pico_fast.Synthesis),
        "bank_dtype": (torch.int8, torch.complex64, "bfloat16", None),
        "easy": ("hard", None),
    },
    "PixelContrastLoss": {
        "temperature": NO_TEMPERATURE,
        "base_temperature": NO_TEMPERATURE,
        "max_samples": NO_COUNT,
        "max_views": NO_COUNT,
        "ignore_index": (1.0, "255", None),
        "seed": NO_SEED,
    },
    "JointLoss": {
        "criterion": (None, 3, nn.ReLU, nn.ReLU()),
        "weight": (-0.1, math.nan, math.inf, True, "1"),
        "warmup_steps": (-1, 0.5, True, None),
        "segmentation_loss": (3, "cross_entropy"),
    },
}
WRONG_METHODS = {
    "bank.enqueue": {
        "embeddings": (*NO_IMAGES, IMAGES[:, :7]),
        "labels": (*NO_MAP, MAP[:1], MAP[:, :4], META["map"]),
    },
    "criterion": {
        "embeddings": (*NO_IMAGES, IMAGES[:, :7]),
        "labels": (*NO_MAP, MAP[:1], MAP[:, :0], META["map"]),
        "logits": NO_PREDICTIONS,
    },
    "joint": {
        "embeddings": (*NO_IMAGES, IMAGES[:, :7]),
        "labels": (*NO_MAP, MAP[:1], META["map"]),
        "logits": (*NO_PREDICTIONS, None, MAP),
    },
    "drop-in": {
        "feats": NO_IMAGES,
        "labels": (*NO_MAP, MAP[:1], META["map"]),
        "predict": [p for p in NO_PREDICTIONS if p is not NO_PREDICTIONS[1]],
        "queue": (
            "queue",
            torch.randn(3, 4),
            torch.randn(3, 4, 7),
            torch.ones(3, 4, 8).long(),
            NO_QUEUE,
        ),
    },
}


def in_words(value):
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}{value.layout}{value.device}".replace("torch.", "")
    # nested lists are of random numbers: a name has to be the same in every process
    return "nested lists" if isinstance(value, list) else repr(value)[:30]


def rows(table):
    return [
        pytest.param(call, name, value, id=f"{call}({name}={in_words(value)})-{n}")
        for call, words in table.items()
        for name, values in words.items()
        for n, value in enumerate(values)
    ]


def snapshot(module):
    return copy.deepcopy(module.state_dict())


@pytest.mark.parametrize(("call", "name", "value"), rows(WRONG))
def test_wrong_argument_is_named(call, name, value, figures):
    function, words = CALLS[call]
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected"):
        function(**(words | {name: value}))
    figures.add("wrong calls", "wrong calls refused")


@pytest.mark.parametrize(("call", "name", "value"), rows(WRONG_METHODS))
def test_wrong_batch_is_named_and_changes_nothing(call, name, value, figures):
    make, method, words = METHODS[call]
    module = make()
    method(module, **words)
    before = snapshot(module)
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected"):
        method(module, **(words | {name: value}))
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    figures.add("wrong calls", "wrong calls refused")


@pytest.mark.parametrize("call", [*CALLS, *METHODS])
def test_the_calls_that_are_made_wrong_are_right(call):
    if call in CALLS:
        function, words = CALLS[call]
        function(**words)
    else:
        make, method, words = METHODS[call]
        module = make()
        before = snapshot(module)
        method(module, **words)
        after = module.state_dict()
        assert any(not torch.equal(before[key], after[key]) for key in before)


def test_everything_public_is_called_wrongly_here():
    methods = {"SelectedKeys", "Tap"}  # results, not calls
    assert set(pico_fast.__all__) - methods <= set(WRONG)


def test_255_is_a_wrong_label_where_another_sentinel_was_named():
    void = MAP.where(MAP != 1, 255)
    pico_fast.PiCoLoss(3, 8, pixel_queue_size=2)(IMAGES, void)
    with pytest.raises(ValueError, match=r"^labels: .*255"):
        pico_fast.PiCoLoss(3, 8, pixel_queue_size=2, ignore_index=-1)(IMAGES, void)


def test_message_tells_what_was_expected_and_what_came():
    with pytest.raises(ValueError, match=r"\[3\] int64 on cpu") as error:
        pico_fast.contrast(ROWS, LABELS[:3])
    assert "expected size 4" in str(error.value)
    with pytest.raises(ValueError, match="semi_hard") as error:
        pico_fast.contrast(ROWS, LABELS, sampling="semihard")
    assert "'semihard'" in str(error.value)
    with pytest.raises(ValueError, match="num_classes = 3") as error:
        criterion()(IMAGES, TOO_HIGH)
    assert "got 3" in str(error.value)
