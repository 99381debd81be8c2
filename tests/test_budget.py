"""`contrast` and `select_keys` against float64, each within an error budget that the arithmetic allows.

Inputs are rounded to their dtype first: truth is made of the same numbers. With eps the rounding of a
product's inputs, an inner product is off by delta = (8 + 4 sqrt D) eps |a| |k|, so a loss by at most
2 delta / temperature and a weight of the gradient by a factor of exp(4 delta / temperature).
"""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, target
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, softplus

import pico_fast
from pico_fast import reference
from pico_fast.selection.options import POSITIVES, SAMPLINGS, Selection, check_selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("uniform", "one class", "long tail", "half empty", "alone")
SHAPES = ("random", "clustered", "equal", "opposite")
CLOTHES = ("plain", "strided", "transposed", "shifted")
SCALES = (1.0, 1.0, 1e-4, 1e4, 1e-40)
# what a product rounds its inputs to; a CPU takes bfloat16 as it is where it can, a GPU always
ROUNDING = {torch.float32: 2.0**-22, torch.float64: 2.0**-50, torch.bfloat16: 2.0**-7}
ROUNDING[torch.float16] = 2.0**-10 if DEVICE == "cuda" else ROUNDING[torch.float32]


class Scene(NamedTuple):
    anchors: Tensor
    anchor_labels: Tensor
    keys: Tensor | None
    key_labels: Tensor | None
    temperature: float
    selection: Selection
    synthesis: "pico_fast.Synthesis | None"
    seed: int

    def call(self, function, **words):
        """`function` of the pairs and of all options that it has."""
        pairs = (self.anchors, self.anchor_labels, self.keys, self.key_labels)
        options = {**vars(self.selection), "seed": self.seed}
        options["sampling"] = options.pop("negatives")
        return function(*pairs, **options, **words)

    def compared(self) -> tuple[Tensor, Tensor]:
        """Keys [K, D] and labels [K] that anchors are compared with."""
        return self[:2] if self.keys is None else self[2:4]


def _rows(n, dim, shape, scale, g):
    rows = torch.randn(n, dim, generator=g, dtype=torch.float64)
    one = torch.randn(dim, generator=g, dtype=torch.float64)
    if shape == "clustered":
        rows = one + 0.02 * rows
    if shape in ("equal", "opposite"):
        rows = one.repeat(n, 1)
    if shape == "opposite":
        rows[1::2] *= -1
    return normalize(rows, dim=1) * scale


def _labels(n, layout, classes, g):
    labels = torch.randint(0, classes, (n,), generator=g)
    if layout == "one class":
        labels.zero_()
    if layout == "long tail":
        labels = torch.where(torch.rand(n, generator=g) < 0.9, 0, labels)
    if layout == "half empty":
        labels = torch.where(torch.rand(n, generator=g) < 0.5, -1, labels)
    if layout == "alone":
        labels = torch.arange(n)
    return labels


def _dress(x, clothes):
    """The same numbers, laid out otherwise in memory."""
    if clothes == "strided" and x.dim() == 2:
        return x.repeat_interleave(2, 1)[:, ::2]
    if clothes == "transposed" and x.dim() == 2:
        return x.T.contiguous().T
    if clothes == "shifted":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


@st.composite
def scenes(draw, samplings=SAMPLINGS, dtypes=DTYPES, with_keys=False, positives=POSITIVES):
    """Anchors, keys and options; `with_keys`: never in batch, and without mixes."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, k = draw(st.integers(1, 24)), draw(st.integers(0, 200))
    dim = draw(st.sampled_from((1, 3, 16, 33, 64, 257)))
    classes, layout = draw(st.integers(1, 6)), draw(st.sampled_from(LAYOUTS))
    shape, clothes = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(CLOTHES))
    dtypes = draw(st.tuples(*[st.sampled_from(dtypes)] * 2))
    scales = draw(st.tuples(*[st.sampled_from(SCALES)] * 2))
    rows = _rows(n + k, dim, shape, 1.0, g)
    labels = _labels(n + k, layout, classes, g).to(DEVICE)
    # what a dtype cannot hold is no input
    scales = [min(s, 1e3) if d == torch.float16 else s for s, d in zip(scales, dtypes, strict=True)]
    anchors = _dress((rows[:n] * scales[0]).to(DEVICE, dtypes[0]), clothes)
    keys = _dress((rows[n:] * scales[1]).to(DEVICE, dtypes[1]), clothes)
    pairs = (anchors, labels[:n], keys, labels[n:])
    if not with_keys and draw(st.booleans()):
        pairs = (*pairs[:2], None, None)
    temperature = draw(st.sampled_from((0.005, 0.07, 0.1, 1.0, 5.0)))
    counts = (draw(st.integers(1, 12)), draw(st.integers(1, 40)))
    mixes = None if with_keys else draw(st.sampled_from((None, pico_fast.Synthesis(4, 3, 6))))
    names = (draw(st.sampled_from(samplings)), draw(st.sampled_from((None, *positives))))
    selection = check_selection(*names, *counts, draw(st.sampled_from((0.1, 0.5, 1.0))))
    return Scene(*pairs, temperature, selection, mixes, 7)


class Bounds(NamedTuple):
    inner: Tensor  # [A] of an inner product
    loss: Tensor  # [A]
    gradient: Tensor  # [A], of its length


def bounds(scene: Scene, loss: Tensor, rounding: dict[torch.dtype, float] = ROUNDING) -> Bounds:
    """What the arithmetic allows, for a loss [A] that is true."""
    in_batch = scene.keys is None
    keys = scene.anchors if in_batch else scene.keys
    sizes = [x.double().norm(dim=1) for x in (scene.anchors, keys)]
    longest = sizes[1].max() if len(keys) else sizes[0].new_zeros(())
    exact = torch.float64 in (scene.anchors.dtype, keys.dtype)
    narrow = rounding[torch.float64 if exact else keys.dtype]
    wide = ROUNDING[torch.float64 if exact else torch.float32]
    rows = 8 + 4 * math.sqrt(keys.shape[1])
    inner = rows * narrow * sizes[0] * longest
    # a mix has unit length; of opposite rows it is divided by a length of which a hundredth may be left
    factor, other = (1, longest) if scene.synthesis is None else (100, longest.clamp(min=1.0))
    s = factor * rows * narrow * sizes[0] * other / scene.temperature
    of_loss = 2 * s + 64 * wide * (1 + loss.abs())
    # what the other side of a pair can weigh
    weight = 2 * other / scene.temperature
    of_gradient = weight * ((4 * s).clamp(max=1) + 64 * narrow)
    if in_batch:  # as a key of each other anchor as well, by weights that only Z has normalised
        of_keys = weight * (torch.expm1((4 * s).clamp(max=300)) + 64 * narrow)
        of_gradient = of_gradient + of_keys.sum()
    # below 1e-38 each term of a float32 sum is off by up to 1e-45
    smallest = 1e-45 * (8 + keys.shape[1]) if not exact else 0.0
    return Bounds(inner + smallest, of_loss, of_gradient + 1e-30)


def truth(scene: Scene, picks) -> tuple[Tensor, Tensor]:
    """Loss [A] and gradient [A, D] in float64, of these picks."""
    anchors = scene.anchors.double().clone().requires_grad_()
    keys = anchors if scene.keys is None else scene.keys.double()
    positive, negative = picks
    if len(keys) == 0:
        keys = anchors.detach()[:1] * 0  # nothing was picked
    s, away = (
        (anchors[:, None] * keys[index.clamp(min=0)]).sum(2) / scene.temperature
        for index in (positive, negative)
    )
    away = away.masked_fill(negative < 0, -math.inf)
    if scene.synthesis and not (negative < 0).all():
        *counts, pool = vars(scene.synthesis).values()
        row = torch.arange(len(anchors), device=DEVICE)
        mixed, exists = reference.synthesise(anchors, keys, negative[:, :pool], row, *counts, scene.seed)
        more = (mixed * anchors[:, None]).sum(2) / scene.temperature
        away = torch.cat([away, more.masked_fill(~exists, -math.inf)], 1)
    some = (away > -math.inf).any(1)
    z = away.masked_fill(~some[:, None], 0.0).logsumexp(1)
    each = softplus(z[:, None] - s, threshold=40.0).masked_fill((positive < 0) | ~some[:, None], 0.0)
    loss = each.sum(1) / (positive >= 0).sum(1).clamp(min=1)
    (gradient,) = torch.autograd.grad(loss.sum(), anchors)
    return loss.detach(), gradient


def check_picks(scene: Scene, picks, allowed: Tensor) -> None:
    """Picks of the sample, of the right number, and none easier than what truth would have picked."""
    keys, labels = scene.compared()
    similarity = scene.anchors.double() @ keys.double().T
    used = (scene.anchor_labels[:, None] >= 0) & (labels >= 0)
    if scene.keys is None:
        used.fill_diagonal_(False)
    same = scene.anchor_labels[:, None] == labels
    ceiling = [(math.inf, math.inf)] * len(similarity)
    for own, index in ((True, picks[0]), (False, picks[1])):
        need, strategy = scene.selection.needed(own), scene.selection.strategy(own)
        offered = torch.ones_like(labels, dtype=torch.bool)
        if need is not None:
            drawn = reference.sample_keys(labels, need, own, scene.seed)
            offered = torch.zeros_like(offered).index_fill_(0, drawn, True)
        for i, row in enumerate(index):
            candidates = (used[i] & (same[i] == own) & offered).nonzero()[:, 0]
            s, found = similarity[i, candidates], row[row >= 0]
            assert len(found) == len(found.unique()) and torch.isin(found, candidates).all()
            assert (row[len(found) :] == -1).all()
            # what lies near the mean of positives may be taken for less similar, or not
            low, high = ceiling[i] if strategy == "bounded" else (math.inf, math.inf)
            fewest, most = (counted(scene.selection, own, int((s < bound).sum())) for bound in (low, high))
            assert fewest <= len(found) <= most
            assert (similarity[i, found] < high).all()
            if own and len(s):
                ceiling[i] = (float(s.mean() - 3 * allowed[i]), float(s.mean() + 3 * allowed[i]))
            hardness = -similarity[i] if own else similarity[i]
            certain = hardness[candidates][s < low].sort(descending=True)[0][: len(found)]
            if len(certain):
                assert (hardness[found] >= certain[-1:] - 2 * allowed[i]).all()


def counted(selection: Selection, own: bool, n: int) -> int:
    """How many of n candidates count."""
    strategy = selection.strategy(own)
    if strategy in ("semi_hard", "bounded"):
        n = math.ceil(selection.hard_fraction * n)
    return n if strategy in ("all", "random") else min(n, selection.count(own))


def shares(found: Tensor, expected: Tensor, allowed: Tensor) -> float:
    """The largest error as a share of what is allowed."""
    error = (found.double() - expected).abs()
    error = error.norm(dim=1) if error.dim() == 2 else error
    assert not error.isnan().any(), "nan"
    return float((error / allowed).max()) if len(error) else 0.0


@given(scenes())
def test_within_the_budget(figures, scene):
    picks = scene.call(pico_fast.select_keys)[:2]
    expected, gradient = truth(scene, picks)
    allowed = bounds(scene, expected)
    check_picks(scene, picks, allowed.inner)
    x = scene.anchors.detach().requires_grad_()
    words = {"temperature": scene.temperature, "synthesis": scene.synthesis, "reduction": "none"}
    loss = scene._replace(anchors=x).call(pico_fast.contrast, **words)
    (found,) = torch.autograd.grad(loss.sum(), x)
    worst = shares(loss.detach(), expected, allowed.loss)
    # the gradient is rounded to the anchors' dtype, and float16 ends at 65504
    info = torch.finfo(scene.anchors.dtype)
    held = (gradient.abs() < info.max / 2).all(1)
    rounded = allowed.gradient + info.eps * gradient.norm(dim=1) + info.tiny * len(gradient[0])
    of_gradient = shares(found[held], gradient[held], rounded[held])
    target(max(worst, of_gradient))
    assert worst <= 1, f"loss: {worst} of its budget"
    assert of_gradient <= 1, f"gradient: {of_gradient} of its budget"
    figures.add("budget", "scenes against float64")
    figures.most("budget", "worst error, as a share of its budget", max(worst, of_gradient))


@given(scenes())
def test_similarities_are_those_of_the_picks(scene):
    chosen = scene.call(pico_fast.select_keys)
    keys, _ = scene.compared()
    allowed = bounds(scene, torch.zeros(len(scene.anchors), device=DEVICE)).inner[:, None]
    for index, found in zip(chosen[:2], chosen[2:], strict=True):
        there = index >= 0
        if len(keys):
            rows = keys.double()[index.clamp(min=0)]
            expected = (scene.anchors.double()[:, None] * rows).sum(2)
            # the public function gives float32, which ends at 1e-45
            error = (found.double() - expected).abs() - 2.0**-23 * expected.abs() - 1e-45
            assert (error.masked_fill(~there, 0.0) <= allowed).all()
        assert not found[~there].any()


@pytest.mark.parametrize("scale", (2.0**8, 2.0**16))
def test_scaled_losses_of_float16_give_scaled_gradients(scale):
    """Loss scaling: a factor in front of the loss comes out in the gradient, or as an infinity."""
    anchors = normalize(torch.randn(12, 64), dim=1).half().to(DEVICE)
    keys, labels = normalize(torch.randn(80, 64), dim=1).half().to(DEVICE), torch.arange(80) % 4
    labels = labels.to(DEVICE)
    gradients = []
    for factor in (1.0, scale):
        x = anchors.clone().requires_grad_()
        (pico_fast.contrast(x, labels[:12], keys, labels, 0.1) * factor).backward()
        gradients.append(x.grad.float())
    scaled = gradients[0] * scale
    finite = scaled.abs() < 60_000
    torch.testing.assert_close(gradients[1][finite], scaled[finite], rtol=2e-2, atol=1e-4 * scale)
    assert finite.float().mean() > 0.5
    assert gradients[1][scaled.abs() > 70_000].isinf().all()
