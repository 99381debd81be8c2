"""The tap: what it catches, that it leaves a model as it found it, what wrong calls say."""

import copy
import io

import pytest
import torch
from tapped import CHANNELS, CLASSES, DIM, Network, assert_same, batch, gradients, make
from torch import nn

import pico_fast
from pico_fast.attach import KNOWN, NAME


class Tokens(nn.Module):
    """Like a vision transformer: tokens [B, N, D] of patches of 4 x 4, class tokens behind them."""

    def __init__(self, class_tokens: int = 0):
        super().__init__()
        self.patches = nn.Conv2d(3, CHANNELS, 4, 4)
        self.extra = nn.Parameter(torch.randn(1, class_tokens, CHANNELS))
        self.norm = nn.LayerNorm(CHANNELS)
        self.classifier = nn.Linear(CHANNELS, CLASSES)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = self.norm(torch.cat([tokens, self.extra.expand(len(images), -1, -1)], 1))
        return self.classifier(tokens)


def traces(model):
    """All that a tap may touch: names of state and modules, hooks of every module."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_state_dict_hooks")
    modules = [
        (name, type(module), *(len(getattr(module, kind)) for kind in hooks))
        for name, module in model.named_modules()
    ]
    return [*model.state_dict(), *modules, *(name for name, _ in model.named_parameters())]


# what it catches


def test_embeddings_are_the_head_of_the_features():
    model, tap = make()
    images, _ = batch()
    logits, embeddings = model(images), tap.embeddings()
    assert embeddings.shape == (2, DIM, 8, 8) and logits.shape == (2, CLASSES, 8, 8)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2, 8, 8), atol=1e-6)
    assert torch.equal(embeddings, tap.head(model.backbone(images)))


@pytest.mark.parametrize("path", ["classifier:input", "backbone:output", "backbone.2:output"])
def test_output_of_a_module_is_the_input_of_the_next(path):
    images, _ = batch()
    (model, tap), (other, other_tap) = make(), make(path, in_channels=CHANNELS)
    assert torch.equal(model(images), other(images))
    assert torch.equal(tap.embeddings(), other_tap.embeddings())


@pytest.mark.parametrize(
    ("size", "class_tokens", "grid"),
    [((16, 16), 0, None), ((8, 24), 0, (2, 6)), ((8, 24), 3, (2, 6))],
)
def test_tokens_become_a_map(size, class_tokens, grid):
    model, tap = make("classifier", Tokens(class_tokens), grid=grid)
    images = torch.randn(2, 3, *size)
    model(images)
    features = model.norm(model.patches(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.allclose(tap.embeddings(), tap.head(features), atol=1e-6)


def test_tokens_that_fill_no_square_ask_for_a_grid():
    model, tap = make("classifier", Tokens())
    with pytest.raises(ValueError, match=r"grid: expected .* the 12 tokens .* got None"):
        model(torch.randn(2, 3, 8, 24))
    tap.detach()
    model, _ = make("classifier", model, grid=(4, 4))
    with pytest.raises(ValueError, match=r"12 tokens of the tapped module, got \(4, 4\)"):
        model(torch.randn(2, 3, 8, 24))


@pytest.mark.parametrize(
    ("library", "path"),
    [(place.library, place.path.partition(":")[0]) for place in KNOWN],
)
def test_known_places_are_found(library, path):
    def build(names):
        if not names:
            return nn.LayerNorm(CHANNELS) if "norm" in path else nn.Conv2d(CHANNELS, CLASSES, 1)
        module = nn.Module()
        module.num_classes = 2
        module.add_module(names[0], build(names[1:]))
        return module

    model = build(path.split("."))
    model.__class__ = type("Model", (nn.Module,), {"__module__": f"{library}.somewhere"})
    if path == "decode_head.1.conv_seg":
        model.decode_head.add_module("0", nn.Identity())
    tap = pico_fast.attach(model)
    assert tap.path.partition(":")[0] == path
    assert tap.class_tokens == (2 if "norm" in path else 0)
    assert tap.head[0].in_channels == (CLASSES if "mask_projection" in path else CHANNELS)


def test_sequential_models():
    model, tap = make("2", nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1)))
    images, labels = batch()
    plain = nn.Sequential(*list(model)[:3])
    assert torch.equal(model(images), plain(images))
    assert all(g.abs().sum() > 0 for g in gradients(model, tap, images, labels).values())
    assert len(tap.detach()) == 3


# what it leaves


def test_detach_leaves_no_trace():
    plain = Network()
    before = traces(plain)
    model, tap = make(model=copy.deepcopy(plain))
    assert traces(model) != before
    images, labels = batch()
    gradients(model, tap, images, labels)
    assert tap.detach() is model
    assert traces(model) == before
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images), plain.eval()(images))
    with pytest.raises(RuntimeError, match="detached already"):
        tap.detach()
    pico_fast.attach(model, "classifier", DIM)


def test_outputs_and_the_models_own_gradients_are_those_without_a_tap():
    plain = Network()
    model, tap = make(model=copy.deepcopy(plain))
    images, labels = batch()
    outputs = [network(images) for network in (plain, model)]
    assert torch.equal(*outputs)
    for logits in outputs:
        nn.functional.cross_entropy(logits, labels[:, ::2, ::2]).backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=False):
        assert torch.equal(p.grad, q.grad), name
    assert all(p.grad is None for p in tap.parameters())


def test_other_hooks_survive_and_a_swapped_norm_does_not_hinder():
    model, tap = make()
    calls = []
    model.classifier.register_forward_pre_hook(lambda *_: calls.append("mine"))
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    tap.detach()
    model.eval()(batch()[0])
    assert calls == ["mine"] and not hasattr(model, NAME)


def test_eval_and_no_grad_catch_nothing():
    model, tap = make()
    images, _ = batch()
    with torch.no_grad():
        model(images)
    with pytest.raises(RuntimeError, match="no features since the last call"):
        tap.embeddings()
    model.eval()(images)
    with pytest.raises(RuntimeError, match="training mode with gradients"):
        tap.embeddings()
    model.train()(images)
    tap.embeddings()
    with pytest.raises(RuntimeError, match="tap at 'classifier'"):
        tap.embeddings()


def test_copies_and_files_have_a_tap_of_their_own():
    model, tap = make()
    images, labels = batch()
    model(images)  # what is caught now belongs to a graph that no copy can have
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    expected = gradients(model, tap, images, labels)
    for other in (copy.deepcopy(model), loaded):
        other_tap = getattr(other, NAME)
        assert other_tap is not tap and other_tap.head is not tap.head
        assert_same(gradients(other, other_tap, images, labels), expected)
        other_tap.detach()
        assert traces(other) == traces(Network())
    assert_same(gradients(model, tap, images, labels), expected)
    fresh, fresh_tap = make()
    fresh.load_state_dict(model.state_dict())
    assert_same(fresh_tap.head.state_dict(), tap.head.state_dict())


# wrong calls


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "resnet"}, TypeError, r"model: expected an nn.Module, got 'resnet'"),
        ({"tap": None}, ValueError, r"Network is not known.*\['backbone.0', 'classifier'\]"),
        (
            {"tap": "head"},
            ValueError,
            r"tap: expected the path of a module, got 'head'; candidates: \['backbone.0', 'cl",
        ),
        ({"tap": ""}, ValueError, "tap: expected the path of a module, got ''"),
        ({"tap": 4}, TypeError, r"tap: expected a module's path or None, got 4 \(int\)"),
        ({"tap": "classifier:both"}, ValueError, "expected 'path' or 'path:output'"),
        (
            {"tap": "backbone.2"},
            ValueError,
            r"in_channels: expected a number.*'backbone.2' \(ReLU\)",
        ),
        ({"in_channels": 0}, ValueError, "in_channels"),
        ({"embedding_dim": 8.0}, TypeError, "embedding_dim"),
        ({"grid": 4}, TypeError, r"grid: expected \(height, width\) or None, got 4"),
        ({"grid": (4, 0)}, ValueError, "grid: expected an integer >= 1, got 0"),
    ],
)
def test_wrong_calls_change_nothing(change, error, message):
    model = Network()
    before = traces(model)
    with pytest.raises(error, match=message):
        pico_fast.attach(**({"model": model, "tap": "classifier"} | change))
    assert traces(model) == before


def test_one_tap_a_model():
    model, tap = make()
    before = traces(model)
    with pytest.raises(ValueError, match="got one at 'classifier'; call its detach"):
        pico_fast.attach(model, "classifier", DIM)
    assert traces(model) == before
    tap.detach()
    pico_fast.attach(model, "backbone:output", DIM, in_channels=CHANNELS)


def test_a_wrapped_model_is_refused():
    for wrapped in (nn.DataParallel(Network()), torch.compile(Network(), backend="eager")):
        with pytest.raises(TypeError, match="expected one not yet wrapped or compiled, got a"):
            pico_fast.attach(wrapped, "module.classifier", DIM)


def test_features_of_another_shape():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    pico_fast.attach(model, "1", DIM)
    with pytest.raises(ValueError, match=r"tokens \[B, N, D\], got \[2, 12\] float32 on cpu"):
        model(torch.randn(2, 3, 2, 2))


def test_features_by_keyword():
    class Keyword(Network):
        def forward(self, images):
            return self.classifier(input=self.backbone(images))

    model, _ = make(model=Keyword())
    with pytest.raises(ValueError, match="called by keyword alone; use 'path:output'"):
        model(batch()[0])
