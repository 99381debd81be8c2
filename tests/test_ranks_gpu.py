"""A bank in two shards on one GPU equals the whole bank, at full size; the ranks are threads."""

import pytest
import torch
import virtual_ranks
from test_contrast_gpu import CHANNELS, CLASSES, SLOTS, anchors_of, bank_of

import pico_fast
from pico_fast.contrast.function import Settings, contrast_rows
from pico_fast.selection.options import SAMPLINGS, check_selection

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_two_shards_of_one_device_are_the_whole(sampling, monkeypatch):
    keys, _, centres = bank_of(SLOTS, True)
    parts = [anchors_of(512, centres) for _ in range(2)]
    seed = torch.tensor(3, device="cuda")

    def work(rank):
        bank = pico_fast.MemoryBank(CLASSES, CHANNELS, SLOTS, 0, device="cuda", placement="sharded")
        whole = keys.view(CLASSES, SLOTS, CHANNELS)
        bank.storage.copy_(whole[:, bank.first_slot : bank.last_slot])
        bank.pixel_count.fill_(SLOTS)
        anchors, labels = parts[rank]
        x = anchors.clone().requires_grad_()
        settings = Settings(check_selection(sampling, None, 1024, 2048, 0.1), 0.1, None, False)
        share = bank.share()
        loss = contrast_rows(x, labels, None, None, share, settings, seed, 512 * rank).loss
        return loss.detach(), *torch.autograd.grad(loss.sum(), x)

    found = virtual_ranks.run(2, work, monkeypatch)
    anchors, labels = (torch.cat(x) for x in zip(*parts, strict=True))
    key_labels = torch.arange(CLASSES, device="cuda").repeat_interleave(SLOTS)
    x = anchors.requires_grad_()
    options = {"sampling": sampling, "reduction": "none", "seed": seed}
    expected = pico_fast.contrast(x, labels, keys, key_labels, **options)
    (grad,) = torch.autograd.grad(expected.sum(), x)
    loss, grads = (torch.cat(x) for x in zip(*found, strict=True))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-4)
    assert (grads - grad).norm() < 1e-3 * grad.norm()


@pytest.mark.parametrize("placement", ("replicated", "sharded"))
def test_steps_equal_those_of_one_process(placement, monkeypatch):
    """COCO-Stuff's bank; uneven batches, the third of two ranks' steps without an image."""

    def batch(step, rank):
        torch.manual_seed(10 * step + rank)
        images = (step + rank) % 3
        x = torch.randn(images, CHANNELS, 64, 64, device="cuda")
        labels = torch.randint(0, 20, (images, 64, 64), device="cuda") + 20 * rank
        return torch.nn.functional.normalize(x, dim=1), labels

    def work(rank):
        options = {"placement": placement, "sampling": "all", "max_images": 2}
        criterion = pico_fast.PiCoLoss(CLASSES, CHANNELS, **options).cuda()
        losses = [criterion(*batch(step, rank)).detach() for step in range(4)]
        return criterion.bank, torch.stack(losses)

    found = virtual_ranks.run(2, work, monkeypatch)
    alone = pico_fast.MemoryBank(CLASSES, CHANNELS, 10_000, 1000, device="cuda")
    for step in range(4):
        alone.enqueue(*(torch.cat(x) for x in zip(batch(step, 0), batch(step, 1), strict=True)))
    for rank, (bank, losses) in enumerate(found):
        assert torch.equal(bank.pixel_count, alone.pixel_count)
        assert torch.equal(bank.region_count, alone.region_count)
        whole = alone.storage if placement == "replicated" else alone.storage.chunk(2, 1)[rank]
        torch.testing.assert_close(bank.storage.float(), whole.float(), rtol=1e-2, atol=1e-3)
        assert losses.isfinite().all() and losses[0] == 0 and losses[3] > 0
