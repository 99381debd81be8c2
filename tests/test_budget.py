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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SAMPLINGS = ("all", "random", "hardest", "semi_hard")
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
    sampling: str
    num_positives: int
    num_negatives: int
    hard_fraction: float
    synthesis: "pico_fast.Synthesis | None"
    seed: int

    def call(self, function, **words):
        """`function` of the pairs and of all options that it has."""
        pairs = (self.anchors, self.anchor_labels, self.keys, self.key_labels)
        counts = {"num_positives": self.num_positives, "num_negatives": self.num_negatives}
        hard = {"hard_fraction": self.hard_fraction, "seed": self.seed, "sampling": self.sampling}
        return function(*pairs, **counts, **hard, **words)


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
def scenes(draw, samplings=SAMPLINGS, dtypes=DTYPES, with_keys=False):
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
    fraction = draw(st.sampled_from((0.1, 0.5, 1.0)))
    return Scene(*pairs, temperature, draw(st.sampled_from(samplings)), *counts, fraction, mixes, 7)


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
    # a mix of opposite rows is divided by a length of which a hundredth may be left
    factor = 1 if scene.synthesis is None else 100
    s = factor * inner / scene.temperature
    of_loss = 2 * s + 64 * wide * (1 + loss.abs())
    # what the other side of a pair can weigh; a mix has unit length
    weight = torch.maximum(longest, torch.ones_like(longest)) if scene.synthesis else longest
    weight = 2 * weight / scene.temperature
    of_gradient = weight * ((4 * s).clamp(max=1) + 64 * narrow)
    if in_batch:  # as a key of each other anchor as well, by weights that only Z has normalised
        of_keys = weight * (torch.expm1((4 * s).clamp(max=300)) + 64 * narrow)
        of_gradient = of_gradient + of_keys.sum()
    smallest = 1e-44 if not exact else 0.0
    return Bounds(inner + smallest, of_loss, of_gradient + 1e-30)


def truth(scene: Scene, picks) -> tuple[Tensor, Tensor]:
    """Loss [A] and gradient [A, D] in float64, of all keys or of these picks."""
    anchors = scene.anchors.double().clone().requires_grad_()
    in_batch = scene.keys is None
    keys = anchors if in_batch else scene.keys.double()
    key_labels = scene.anchor_labels if in_batch else scene.key_labels
    mixes = scene.synthesis and tuple(vars(scene.synthesis).values())
    if picks is None:
        pairs = (None, None) if in_batch else (keys, key_labels)
        loss, _ = reference.contrast(
            anchors, scene.anchor_labels, *pairs, scene.temperature, mixes=mixes, seed=scene.seed
        )
    else:
        positive, negative = picks
        if len(keys) == 0:
            keys = anchors.detach()[:1] * 0  # nothing was picked
        s, away = (
            (anchors[:, None] * keys[index.clamp(min=0)]).sum(2) / scene.temperature
            for index in (positive, negative)
        )
        away = away.masked_fill(negative < 0, -math.inf)
        if mixes and not (negative < 0).all():
            mixed, exists = reference.synthesise(
                anchors, keys, negative[:, : mixes[2]], *mixes[:2], scene.seed
            )
            more = (mixed * anchors[:, None]).sum(2) / scene.temperature
            away = torch.cat([away, more.masked_fill(~exists, -math.inf)], 1)
        some = (away > -math.inf).any(1)
        z = away.masked_fill(~some[:, None], 0.0).logsumexp(1)
        each = softplus(z[:, None] - s, threshold=40.0).masked_fill(
            (positive < 0) | ~some[:, None], 0.0
        )
        loss = each.sum(1) / (positive >= 0).sum(1).clamp(min=1)
    (gradient,) = torch.autograd.grad(loss.sum(), anchors)
    return loss.detach(), gradient


def check_picks(scene: Scene, picks, allowed: Tensor) -> None:
    """Picks of the right number, and none easier than what truth would have picked."""
    in_batch = scene.keys is None
    keys, labels = (scene.anchors, scene.anchor_labels) if in_batch else scene[2:4]
    similarity = scene.anchors.double() @ keys.double().T
    used = (scene.anchor_labels[:, None] >= 0) & (labels >= 0)
    own = scene.anchor_labels[:, None] == labels
    positive = used & own
    if in_batch:
        positive.fill_diagonal_(False)
    counts = (scene.num_positives, scene.num_negatives)
    for index, mask, count, sign in zip(
        picks, (positive, used & ~own), counts, (-1, 1), strict=True
    ):
        for i in range(len(index)):
            found = index[i][index[i] >= 0]
            n = int(mask[i].sum())
            if scene.sampling == "semi_hard":
                pool = min(n, max(1, math.ceil(scene.hard_fraction * n)))
            else:
                pool = n if scene.sampling == "random" else min(n, count)
            assert len(found) == min(pool, count) == len(found.unique())
            assert mask[i, found].all() and (index[i][len(found) :] == -1).all()
            if len(found):
                hardness = sign * similarity[i]
                threshold = hardness[mask[i]].sort(descending=True)[0][pool - 1]
                assert (hardness[found] >= threshold - 2 * allowed[i]).all()


def shares(found: Tensor, expected: Tensor, allowed: Tensor) -> float:
    """The largest error as a share of what is allowed."""
    error = (found.double() - expected).abs()
    error = error.norm(dim=1) if error.dim() == 2 else error
    assert not error.isnan().any(), "nan"
    return float((error / allowed).max()) if len(error) else 0.0


@given(scenes())
def test_within_the_budget(figures, scene):
    picks = None
    if scene.sampling != "all":
        chosen = scene.call(pico_fast.select_keys)
        picks = chosen[:2]
        if scene.sampling == "random":
            # the same draw; its order follows the similarities, which are rounded
            specified = scene.call(pico_fast.select_keys, impl="reference")
            for mine, theirs in zip(picks, specified[:2], strict=True):
                assert torch.equal(mine.sort()[0], theirs.sort()[0])
    expected, gradient = truth(scene, picks)
    allowed = bounds(scene, expected)
    if picks is not None:
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


@given(scenes(("hardest", "random", "semi_hard")))
def test_similarities_are_those_of_the_picks(scene):
    chosen = scene.call(pico_fast.select_keys)
    keys = scene.anchors if scene.keys is None else scene.keys
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
