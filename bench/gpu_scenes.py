"""What is checked, timed and swept on a GPU: the scenes of first_light.py, gpu_times.py and gpu_tiles.py.

gpu_variants.py runs their calls on a CPU with kernels that do nothing, to know every variant that they
launch. So a call does nothing but what is checked or timed.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import cases
import ours
import torch
from cases import CHANNELS, COUNTS, TEMPERATURE
from runs import with_gradient
from torch import Tensor
from torch.nn.functional import normalize

import pico_fast
from pico_fast.contrast import eager as sums
from pico_fast.contrast import ops
from pico_fast.contrast.function import Settings
from pico_fast.regions import pool_backward_torch, pool_torch
from pico_fast.selection import eager, sample
from pico_fast.selection import layout as layouts
from pico_fast.selection import ops as choosing
from pico_fast.selection.layout import Cut, Layout
from pico_fast.selection.options import SAMPLINGS

FULL = cases.DataSet("171 classes x 11,000", 171, 10_000, 1_000)
# where the truth in float64 sorts whole rows of similarities
SMALL = cases.DataSet("171 classes x 1,100", 171, 1_000, 100)
FEW, MANY = 1024, 4096
EVERY = Cut()
# so high that every weight is 1
HOT = 1e6
# without them values are 0: where nothing is computed only sizes matter
has_values = True


class Check(NamedTuple):
    """A call, and how wrong what it returned is: (error, allowed) of each result."""

    call: Callable[[], tuple[Tensor, ...]]
    errors: Callable[..., list[tuple[float, float]]]


def values(*size: int, device: str) -> Tensor:
    """Normal values."""
    return torch.randn(size, device=device) if has_values else torch.zeros(size, device=device)


@functools.cache
def centres(device: str) -> Tensor:
    """What the vectors of each class lie around [C, D]."""
    torch.manual_seed(0)
    return 0.3 * values(FULL.classes, CHANNELS, device=device)


@functools.cache
def bank(data_set: cases.DataSet, device: str) -> pico_fast.MemoryBank:
    """A bank in bfloat16, every slot of both queues filled."""
    made = pico_fast.MemoryBank(
        data_set.classes, CHANNELS, data_set.pixels, data_set.regions, device=device
    )
    if has_values:
        for rows, centre in zip(made.storage, centres(device), strict=True):
            rows.copy_(normalize(values(*rows.shape, device=device) + centre, dim=1))
    made.pixel_count.fill_(data_set.pixels)
    made.region_count.fill_(data_set.regions)
    return made


def anchors(n: int, device: str) -> tuple[Tensor, Tensor]:
    """Anchors [n, D], which bfloat16 has exactly, and their labels [n]; some slots are empty."""
    labels = torch.randint(-1, FULL.classes, (n,), generator=torch.Generator().manual_seed(1)).to(device)
    rows = values(n, CHANNELS, device=device) + centres(device)[labels.clamp(min=0)]
    return normalize(rows, dim=1).bfloat16().float(), labels


def layout(data_set: cases.DataSet, device: str, n: int | None = None) -> Layout:
    """FEW anchors, or n, against the bank."""
    share = bank(data_set, device).share()
    return layouts.of_bank(*anchors(n or FEW, device), share.keys, share.ranges)


def exact(of: Layout) -> Layout:
    """The layout whose similarities are float64."""
    return of._replace(anchors=of.anchors.double())


def close(found, expected, allowed: float) -> list[tuple[float, float]]:
    """Errors relative to the length of each result; what is not finite has to be equal."""
    errors = []
    for mine, theirs in zip(found, expected, strict=True):
        finite = theirs.isfinite()
        same = torch.equal(mine[~finite].double(), theirs[~finite].double())
        error = (mine.double() - theirs)[finite].norm() / theirs[finite].norm().clamp(min=1e-9)
        errors.append((error.item() if same else float("inf"), allowed))
    return errors


def equal(found, expected) -> list[tuple[float, float]]:
    """How many values differ; none may."""
    return [((a != b).sum().item(), 0.0) for a, b in zip(found, expected, strict=True)]


def seed_of(device: str) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=device)


def all_keys(op: str, device: str) -> Check:
    """Negatives or positives, all keys of the full bank."""
    of = layout(FULL, device)
    z = torch.linspace(0, 20, FEW, device=device)

    def run(page, of: Layout):
        if op == "negatives":
            return page.negatives(of, EVERY, TEMPERATURE, True)[:3]
        return page.positives(of, EVERY, z, TEMPERATURE, True)

    # weights are rounded to bfloat16 once
    return Check(lambda: run(ops, of), lambda found: close(found, run(sums, exact(of)), 5e-3))


def keys_grad(own: bool, device: str) -> Check:
    """The gradient of all keys of the full bank, from one side."""
    of = layout(FULL, device)
    z, factor = torch.linspace(12, 20, FEW, device=device), torch.ones(FEW, device=device)

    def errors(found):
        truth = sums.keys_grad(exact(of), EVERY, own, z.double(), factor.double(), TEMPERATURE)
        return close(found, [truth], 1e-2)

    return Check(lambda: (ops.keys_grad(of, EVERY, own, z, factor, TEMPERATURE),), errors)


def sampled(own: bool, bounded: bool, device: str) -> tuple[Layout, Cut]:
    """The sample of one side and its cut."""
    name = "bounded" if bounded else "semi_hard"
    chosen, slots = ours.selection_of(name), bank(FULL, device).slots
    of = sample.draw_sample(layout(FULL, device), chosen, own, seed_of(device), slots)
    # about the mean similarity of positives
    ceiling = torch.linspace(0.0, 0.15, FEW, device=device) if bounded else None
    return of, Cut(ceiling, chosen.count(own), chosen.hard_fraction)


def cut(own: bool, bounded: bool, device: str) -> Check:
    """Negatives or positives, the cut of a sample of the full bank."""
    of, counted = sampled(own, bounded, device)
    z = torch.linspace(0, 20, FEW, device=device)

    def run(page, of: Layout, counted: Cut, z: Tensor):
        if own:
            return page.positives(of, counted, z, TEMPERATURE, True)
        return page.negatives(of, counted, TEMPERATURE, True)[:3]

    def errors(found):
        # the truth of a few anchors, for each of which it sorts a sample
        few = slice(None, None, 8)
        part = of._replace(anchors=of.anchors[few], anchor_class=of.anchor_class[few])
        ceiling = counted.ceiling if counted.ceiling is None else counted.ceiling[few].double()
        truth = run(sums, exact(part), counted._replace(ceiling=ceiling), z[few])
        # of keys that are as hard as the last one in float16 others may count
        return close([x[few] for x in found], truth, 2e-2)

    return Check(lambda: run(ops, of, counted, z), errors)


def tiles(own: bool, bounded: bool, device: str) -> Check:
    """The cut and the sums see the same similarities: exactly the keys that the cut chose count.

    With every weight 1 exp(lse) is their number, and so are the losses over log 2.
    """
    of, counted = sampled(own, bounded, device)

    def call():
        if own:
            return ops.positives(of, counted, torch.zeros(FEW, device=device), HOT, False)[:1]
        found = ops.negatives(of, counted, HOT, False)
        return (found.lse, found.below) if bounded else (found.lse,)

    def errors(found):
        if own:
            number, offered = found[0].double() / torch.tensor(2.0).log().item(), of.available(True)
        else:
            number, offered = found[0].double().exp(), found[1] if bounded else of.available(False)
        return equal([number.round()], [counted.wanted(offered)])

    return Check(call, errors)


def sample_keys(own: bool, device: str) -> Check:
    """The keys that are drawn of the full bank."""
    of, chosen, slots = layout(FULL, device), ours.selection_of("semi_hard"), bank(FULL, device).slots

    def call():
        drawn = sample.draw_sample(of, chosen, own, seed_of(device), slots)
        return drawn.key_order, drawn.ranges

    def errors(found):
        with mock.patch.object(choosing, "sample_keys", eager.sample_keys):
            return equal(found, call())

    return Check(call, errors)


def hardest(own: bool, device: str) -> Check:
    """Lists of the hardest keys of the small bank."""
    of, count = layout(SMALL, device), COUNTS[0 if own else 1]

    def errors(found):
        index, similarity = found
        _, truth, _ = eager.hardest(exact(of), own, None, count, False)
        named = torch.zeros_like(similarity)
        for row, (i, anchor) in enumerate(zip(index, of.anchors, strict=True)):
            named[row] = (of.keys[i.clamp(0, len(of.keys) - 1)].float() @ anchor).masked_fill(i < 0, 0.0)
        n = equal([(index >= 0).sum(1)], [of.available(own).clamp(max=count)])
        return n + close([similarity, named], [truth, similarity.double()], 1e-4)

    return Check(lambda: choosing.hardest(of, own, None, count, False)[:2], errors)


def picks(n: int, n_keys: int, device: str) -> Tensor:
    """Some keys for each of FEW anchors [FEW, n], -1 behind the last."""
    index = torch.randint(0, n_keys, (FEW, n), generator=torch.Generator().manual_seed(2))
    return index.masked_fill(torch.arange(n) >= n - torch.arange(FEW)[:, None] % 7, -1).to(device)


def weighted_rows(device: str) -> Check:
    keys = bank(FULL, device).share().keys
    index = picks(COUNTS[1], len(keys), device)
    weight = (values(*index.shape, device=device) / COUNTS[1]).masked_fill(index < 0, 0.0)
    return Check(
        lambda: (choosing.weighted_rows(keys, index, weight),),
        lambda found: close(found, [eager.weighted_rows(keys, index, weight.double())], 1e-4),
    )


def mix_negatives(device: str) -> Check:
    of, mixes = layout(FULL, device), pico_fast.Synthesis()
    pool, row = picks(mixes.pool, len(of.keys), device), torch.arange(FEW, device=device)
    how = (pool, row, mixes.negative_negative, mixes.negative_anchor, TEMPERATURE, seed_of(device))
    return Check(
        lambda: choosing.mix_negatives(of.anchors, of.keys, *how),
        lambda found: close(found, eager.mix_negatives(of.anchors.double(), of.keys, *how), 1e-3),
    )


def region_pool(device: str) -> Check:
    """Forward and backward, planes and pixels."""
    images = pictures(16, 128, device)
    args = (images.labels, FULL.classes)
    planes = images.embeddings
    pixels = planes.contiguous(memory_format=torch.channels_last)
    back = torch.ops.pico_fast.region_pool_backward

    def call():
        means, counts = torch.ops.pico_fast.region_pool(planes, *args)
        also, _ = torch.ops.pico_fast.region_pool(pixels, *args)
        grads = (back(means, images.labels, counts, torch.float32, last) for last in (False, True))
        return means, counts, also, *grads

    def errors(found):
        means, counts = pool_torch(planes.double(), *args)
        grad = pool_backward_torch(means, images.labels, counts, torch.float64, False)
        return close(found, (means, counts.double(), means, grad, grad), 1e-4)

    return Check(call, errors)


@functools.cache
def pictures(batch: int, side: int, device: str) -> cases.Images:
    """A batch of so many images, and how far they are high and wide."""
    if has_values:
        return cases.images(FULL, batch, side, side, device)
    labels = torch.zeros(batch, side, side, dtype=torch.int64, device=device)
    return cases.Images(torch.zeros(batch, CHANNELS, side, side, device=device), labels, labels)


class Step:
    """A step of the criterion: forward, bank update and backward to the embeddings."""

    def __init__(self, data_set: cases.DataSet, n: int, batch: tuple[int, int], device: str, **options):
        sizes = {"pixel_queue_size": data_set.pixels, "region_queue_size": data_set.regions}
        self.criterion = pico_fast.PiCoLoss(data_set.classes, max_samples=n, **sizes, **options)
        self.criterion.to(device).bank = bank(data_set, device)
        self.images = pictures(*batch, device)
        self.leaf = self.images.embeddings.detach().requires_grad_()

    def __call__(self) -> tuple[Tensor, Tensor]:
        loss = self.criterion(self.leaf, self.images.labels, self.images.predictions)
        return loss.detach(), torch.autograd.grad(loss, self.leaf)[0]


def graph(sampling: str, device: str) -> Step:
    """A step that has to be one graph, its mixes included."""
    mixes = {} if sampling in ("all", "random") else {"synthesis": pico_fast.Synthesis()}
    return Step(SMALL, FEW, (4, 64), device, sampling=sampling, **mixes)


_PART = functools.partial
_SIDES = (("negatives", False), ("positives", True))
_CUTS = (
    ("semi_hard negatives", False, False), ("semi_hard positives", True, False), ("bounded", False, True)
)  # fmt: skip
# name: what makes the check, or the step of a graph, on a device
CHECKS = {
    **{f"{side}, all keys": _PART(all_keys, side) for side, _ in _SIDES},
    **{f"keys_grad, {side}": _PART(keys_grad, own) for side, own in _SIDES},
    **{f"sample_keys, {side}": _PART(sample_keys, own) for side, own in _SIDES},
    **{f"cut, {name}": _PART(cut, *how) for name, *how in _CUTS},
    **{f"same tiles, {name}": _PART(tiles, *how) for name, *how in _CUTS},
    **{f"hardest, {side}": _PART(hardest, own) for side, own in _SIDES},
    "weighted_rows": weighted_rows,
    "mix_negatives": mix_negatives,
    "region_pool": region_pool,
    **{f"graph, {sampling}": _PART(graph, sampling) for sampling in SAMPLINGS},
}


def against_the_bank(name: str, n: int, device: str) -> Callable[[], tuple]:
    """Loss and gradient of n anchors against the full bank, as a criterion calls it."""
    settings = Settings(ours.selection_of(name), TEMPERATURE, None, False)
    rows, labels = anchors(n, device)
    return with_gradient(ours.bank_loss, rows, labels, bank(FULL, device), settings, seed_of(device))


def pooling(n: int, device: str) -> Callable[[], tuple]:
    """Region pooling of a batch, forward and backward; n is not its size."""
    images = pictures(16, 128, device)
    leaf = images.embeddings.detach().requires_grad_()

    def call():
        means, _ = torch.ops.pico_fast.region_pool(leaf, images.labels, FULL.classes)
        return means.detach(), torch.autograd.grad(means, leaf, means.detach())[0]

    return call


def times() -> dict[tuple[str, int], Callable]:
    """What is timed: (name, number of anchors) to what makes its call on a device."""
    found = {}
    for n in (FEW, MANY):
        for name in ("all", *ours.SAMPLED, "hardest"):
            found[f"contrast, {name}", n] = _PART(against_the_bank, name, n)
        found["criterion step", n] = _PART(Step, FULL, n, (16, 128))
    found["region pooling", 0] = _PART(pooling, 0)
    return found


def sums_of_all_keys(device: str) -> Callable[[], tuple]:
    """The call that tiles are swept with."""
    of = layout(FULL, device, MANY)
    return lambda: ops.negatives(of, EVERY, TEMPERATURE, True)
