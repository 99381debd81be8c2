"""The Triton kernels of selection and of picked keys: interpreted without a GPU, for real with one."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import pico_fast
from pico_fast import picked, reference, synthesis

selection_gpu = pytest.importorskip("pico_fast.selection_gpu", reason="needs Triton")
picked_gpu = pytest.importorskip("pico_fast.picked_gpu", reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor(5)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def tf32():
    """float32 keys are taken where TF32 may be used; the interpreter computes it exactly."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def scene(n_anchors, n_keys, dim, classes, kind="random", seed=0):
    """Anchors, labels, keys, labels; some slots of both are empty."""
    g = torch.Generator().manual_seed(seed)
    anchor_labels = torch.randint(-1, classes, (n_anchors,), generator=g)
    key_labels = torch.randint(-1, classes, (n_keys,), generator=g)
    anchors = torch.randn(n_anchors, dim, generator=g)
    keys = torch.randn(n_keys, dim, generator=g)
    if kind == "clustered":
        centres = 2 * torch.randn(classes, dim, generator=g)
        anchors += centres[anchor_labels.clamp(min=0)]
        keys += centres[key_labels.clamp(min=0)]
    elif kind == "duplicates":
        keys = keys[torch.randint(0, 7, (n_keys,), generator=g)]
    elif kind == "periodic":  # every 16th key is far more similar: a strided sample sees only those
        keys[::16] += 5 * anchors[:1]
    return normalize(anchors, dim=1), anchor_labels, normalize(keys, dim=1), key_labels


def run(sampling, scene, positives, negatives, fraction=0.3, segments=None):
    anchors, anchor_labels, keys, key_labels = (x if x is None else x.to(DEVICE) for x in scene)
    if segments is not None:
        key_labels, segments = None, segments.to(DEVICE)
    args = (anchors, anchor_labels, keys, key_labels, sampling, positives, negatives, fraction)
    found = selection_gpu.select_keys(*args, SEED.to(DEVICE), segments)
    return tuple(x.cpu() for x in found)


def check_hardest(found, scene, positives, negatives):
    """Similarities to rounding; index sets equal outside a rounding band at the threshold."""
    anchors, anchor_labels, keys, key_labels = scene
    in_batch = keys is None
    keys, key_labels = (anchors, anchor_labels) if in_batch else (keys, key_labels)
    exact = anchors.double() @ keys.double().T
    band = 1e-6 if DEVICE == "cpu" and keys.dtype == torch.float32 else 8e-3
    for side, (sign, count) in enumerate(((-1, positives), (1, negatives))):
        index, similarity = found[side], found[2 + side]
        for i, label in enumerate(anchor_labels.tolist()):
            candidate = (key_labels >= 0) & ((key_labels == label) == (sign < 0)) & (label >= 0)
            if in_batch:
                candidate[i] = False
            n = min(count, int(candidate.sum()))
            mine = index[i, :n]
            assert (index[i, n:] == -1).all() and (similarity[i, n:] == 0).all()
            assert candidate[mine].all() and len(set(mine.tolist())) == n
            torch.testing.assert_close(
                similarity[i, :n].double(), exact[i, mine], rtol=0, atol=band
            )
            if n == 0:
                continue
            hardness = sign * exact[i].masked_fill(~candidate, -sign * math.inf)
            least = hardness.topk(n).values[-1]
            assert (hardness[mine] >= least - 2 * band).all()
            sure = candidate & (hardness > least + 2 * band)
            assert torch.isin(sure.nonzero()[:, 0], mine).all()
            assert (sign * similarity[i, :n]).diff().le(0).all()


SCENES = [
    (9, 60, 16, 3, 4, 8),
    (37, 150, 19, 5, 8, 30),
    (20, 40, 16, 3, 50, 60),  # more than there are
    (30, 130, 24, 4, 1, 1),
    (5, 64, 16, 1, 4, 4),  # no negatives
]


@pytest.mark.parametrize("size", SCENES)
@pytest.mark.parametrize("kind", ("random", "clustered", "duplicates"))
def test_hardest_by_digits(size, kind):
    *size, positives, negatives = size
    of = scene(*size, kind)
    found = run("hardest", of, positives, negatives)
    check_hardest(found, of, positives, negatives)
    if DEVICE == "cpu" and kind == "duplicates":  # ties go by lower index
        expected = pico_fast.select_keys(*of, "hardest", positives, negatives)
        assert torch.equal(found[1], expected.negative_index)


@pytest.mark.parametrize("kind", ("random", "clustered", "duplicates", "periodic"))
def test_hardest_from_a_sample_and_its_repair(kind, monkeypatch):
    monkeypatch.setattr(selection_gpu, "_FEW", 2)
    of = scene(24, 1600, 16, 5, kind)
    repaired = []
    original = selection_gpu._Side.exact_threshold

    def watched(side, active, rank):
        if not side.options["OWN"]:
            repaired.append(int(active.sum()))
        return original(side, active, rank)

    monkeypatch.setattr(selection_gpu._Side, "exact_threshold", watched)
    check_hardest(run("hardest", of, 8, 16), of, 8, 16)
    # many equal similarities overflow the candidates; elsewhere the sample serves most anchors
    used = int((of[1] >= 0).sum())
    assert (repaired == [used]) if kind == "duplicates" else (repaired[0] <= used)


def test_hardest_in_batch_and_in_bfloat16():
    of = scene(40, 1, 24, 4)
    check_hardest(run("hardest", (*of[:2], None, None), 6, 9), (*of[:2], None, None), 6, 9)
    of = scene(20, 200, 24, 4)
    of = (of[0], of[1], of[2].bfloat16(), of[3])
    rounded = (of[0].bfloat16().float() if DEVICE == "cuda" else of[0], *of[1:])
    check_hardest(run("hardest", of, 6, 9), rounded, 6, 9)


def test_straight_from_a_partly_filled_bank():
    bank = pico_fast.MemoryBank(5, 16, 23, 7, dtype=torch.float32)
    bank.storage.copy_(normalize(torch.randn(5, 30, 16), dim=2))
    bank.pixel_count.copy_(torch.tensor([23, 4, 0, 11, 20]))
    bank.region_count.copy_(torch.tensor([7, 0, 0, 3, 7]))
    keys, key_labels = bank.keys()
    anchors, anchor_labels, _, _ = scene(25, 1, 16, 5)
    of = (anchors, anchor_labels, keys, key_labels)
    for sampling in ("hardest", "semi_hard"):
        found = run(sampling, of, 6, 20, segments=bank.segments())
        expected = run(sampling, of, 6, 20)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    check_hardest(run("hardest", of, 6, 20, segments=bank.segments()), of, 6, 20)


@pytest.mark.parametrize("kind", ("clustered", "duplicates"))
@pytest.mark.parametrize("size", SCENES)
def test_semi_hard_of_few_keys_is_that_of_the_reference(size, kind):
    *size, positives, negatives = size
    of = scene(*size, kind)
    found = run("semi_hard", of, positives, negatives)
    expected = pico_fast.select_keys(
        *of, "semi_hard", positives, negatives, 0.3, seed=5, impl="reference"
    )
    if DEVICE == "cpu":  # no rounding band: both sides are float32
        assert torch.equal(found[0], expected.positive_index)
        assert torch.equal(found[1], expected.negative_index)
    torch.testing.assert_close(found[3], expected.negative_similarity, rtol=0, atol=1e-2)


def test_semi_hard_in_batch():
    of = (*scene(45, 1, 16, 4)[:2], None, None)
    found = run("semi_hard", of, 4, 9)
    expected = pico_fast.select_keys(*of, "semi_hard", 4, 9, 0.3, seed=5)
    assert torch.equal(found[0], expected.positive_index)
    assert torch.equal(found[1], expected.negative_index)


def test_semi_hard_from_a_sample(monkeypatch):
    """Picks lie in the hardest share but for a little; no duplicates, counts exact."""
    monkeypatch.setattr(selection_gpu, "_SHARP", 200)
    of = scene(12, 3000, 16, 6)
    found = run("semi_hard", of, 8, 20, fraction=0.1)
    anchors, anchor_labels, keys, key_labels = of
    exact = anchors.double() @ keys.double().T
    beyond = total = 0
    for i, label in enumerate(anchor_labels.tolist()):
        mine = found[1][i]
        if label < 0:
            assert (mine == -1).all()
            continue
        candidate = (key_labels >= 0) & (key_labels != label)
        assert (mine >= 0).all() and len(set(mine.tolist())) == 20 and candidate[mine].all()
        pool = math.ceil(0.1 * int(candidate.sum()))
        least = exact[i].masked_fill(~candidate, -math.inf).topk(pool).values[-1]
        beyond += int((exact[i, mine] < least - 1e-6).sum())
        total += 20
    # a sample of 256 places its own 10 % within 2 % of theirs; at full size the sample is 32768
    assert beyond <= 0.2 * total


def test_semi_hard_walks_where_the_sample_holds_too_few(monkeypatch):
    monkeypatch.setattr(selection_gpu, "_SHARP", 40)
    anchors, _, keys, _ = scene(10, 400, 16, 2)
    g = torch.Generator().manual_seed(3)
    key_labels = (torch.rand(400, generator=g) < 0.1).long()  # class 0 leaves few negatives
    anchor_labels = torch.arange(10) % 2
    of = (anchors, anchor_labels, keys, key_labels)
    found = run("semi_hard", of, 4, 9)
    expected = pico_fast.select_keys(*of, "semi_hard", 4, 9, 0.3, seed=5)
    exact = anchor_labels == 0
    assert torch.equal(found[1][exact], expected.negative_index[exact])
    assert torch.equal(found[0], expected.positive_index)


def picks(n_anchors, n_keys, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(n_keys, generator=g)[:n] for _ in range(n_anchors)])
    kept = torch.randint(0, n + 1, (n_anchors, 1), generator=g)
    return torch.where(torch.arange(n) < kept, index, -1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("dim", (16, 40, 256))
def test_picked_keys(dim, dtype):
    anchors, _, keys, _ = scene(7, 50, dim, 3)
    index, keys = picks(7, 50, 21), keys.to(dtype)
    weight = torch.randn(index.shape).masked_fill(index < 0, 0.0)
    on = [x.to(DEVICE) for x in (anchors, keys, index, weight)]
    for positive in (False, True):
        order, products = picked_gpu.rank_keys(on[0], on[1], on[2], positive)
        expected, expected_products = picked.rank_torch(anchors, keys, index, positive)
        assert torch.equal(order.cpu(), expected)
        torch.testing.assert_close(products.cpu(), expected_products, rtol=1e-5, atol=1e-6)
    out = picked_gpu.weighted_rows(on[1], on[2], on[3]).cpu()
    torch.testing.assert_close(out, picked.rows_torch(keys, index, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", (True, False))
@pytest.mark.parametrize("dim", (16, 40))
@pytest.mark.parametrize("temperature", (0.01, 0.1))
def test_mixes_are_those_of_the_reference(dim, unit, temperature):
    anchors, _, keys, _ = scene(8, 60, dim, 3)
    if not unit:
        anchors, keys = 3 * anchors, keys * torch.rand(60, 1)
    keys[5] = -keys[4]  # two that have no mean
    index = picks(8, 60, 12)
    index[0] = torch.tensor([4, 5] + [-1] * 10)
    args = (11, 7, temperature, SEED)
    found = picked_gpu.mix_negatives(
        anchors.to(DEVICE), keys.to(DEVICE), index.to(DEVICE), *args[:3], SEED.to(DEVICE)
    )
    mixed, exists = reference.synthesise(anchors.double(), keys.double(), index, 11, 7, SEED)
    s = torch.einsum("amd,ad->am", mixed, anchors.double()) / temperature
    lse = s.masked_fill(~exists, -math.inf).logsumexp(1)
    weight = torch.exp(s - lse[:, None]).masked_fill(~exists, 0.0).nan_to_num(0.0)
    mean = torch.einsum("am,amd->ad", weight, mixed)
    torch.testing.assert_close(
        found[0].cpu().double(), lse, rtol=1e-5, atol=1e-3 * (not unit) + 1e-4
    )
    torch.testing.assert_close(found[1].cpu().double(), mean, rtol=1e-3, atol=1e-4)
    plain = synthesis.mix_any(anchors, keys, index, *args)
    torch.testing.assert_close(found[1].cpu(), plain[1], rtol=1e-3, atol=1e-4)


def test_deviation_of_semi_hard_at_full_size():
    """171 x 2,000 keys, 2048 of the hardest 10 %: beyond the pool at most 2 %, ranks uniform within."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(171, 16, generator=g)
    key_labels = torch.arange(171).repeat_interleave(2000)
    keys = normalize(torch.randn(len(key_labels), 16, generator=g) + centres[key_labels], dim=1)
    anchor_labels = torch.arange(0, 171, 43)
    anchors = normalize(torch.randn(4, 16, generator=g) + centres[anchor_labels], dim=1)
    arranged = selection_gpu.class_order.class_order(
        *(x.to(DEVICE) for x in (anchor_labels, key_labels)), None
    )
    work = selection_gpu.pass_gpu.make_pass(anchors.to(DEVICE), keys.to(DEVICE), arranged, 1.0)
    side = selection_gpu._Side(work, False, False, 2048)
    used = (arranged.low >= 0).int()
    selection_gpu._semi_hard(side, used, 0.1, SEED.to(DEVICE), reference.NEGATIVE)
    index = side.ordered()[0].cpu()
    exact = anchors.double() @ keys.double().T
    ranks = []
    for i, label in enumerate(anchor_labels.tolist()):
        mine = index[i]
        assert (mine >= 0).all() and len(set(mine.tolist())) == 2048
        assert (key_labels[mine] != label).all()
        hardness = exact[i].masked_fill(key_labels == label, -math.inf)
        place = torch.empty_like(key_labels).scatter_(
            0, hardness.argsort(descending=True), torch.arange(len(key_labels))
        )
        ranks.append(place[mine] / math.ceil(0.1 * 170 * 2000))
    share = torch.cat(ranks)
    beyond = (share >= 1).double().mean()
    assert beyond <= 0.02, beyond
    within = share[share < 1].sort().values
    steps = torch.arange(1, len(within) + 1) / len(within)
    assert (steps - within).abs().max() <= 0.02
    print(f"beyond the pool {beyond:.4f}, Kolmogorov-Smirnov {(steps - within).abs().max():.4f}")


@pytest.mark.parametrize("sampling", ("hardest", "semi_hard"))
def test_one_side_alone_costs_no_walk_of_the_other(sampling, monkeypatch):
    """A count of 0, which the op takes though the public function does not."""
    pairs, sides = scene(7, 90, 16, 3), []
    both = run(sampling, pairs, 5, 8)
    plain = torch.ops.pico_fast.select_keys(*pairs, sampling, 5, 0, 0.3, SEED)
    original = selection_gpu._Side

    def watched(work, own, in_batch, count):
        sides.append(own)
        return original(work, own, in_batch, count)

    monkeypatch.setattr(selection_gpu, "_Side", watched)
    positives, negatives = run(sampling, pairs, 5, 0), run(sampling, pairs, 0, 8)
    assert sides == [True, False]
    assert torch.equal(positives[0], both[0]) and torch.equal(negatives[1], both[1])
    assert positives[1].shape == positives[3].shape == negatives[0].shape == (7, 0)
    assert torch.equal(plain[0], both[0]) and plain[1].shape == plain[3].shape == (7, 0)
