"""Synthesis: extra negatives mixed from an anchor's hard ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pico_fast import checks, reference
from pico_fast.selection import product_dtype

# mixed values held at a time
_BLOCK = 2**24

torch.library.define(
    "pico_fast::mix_negatives",
    "(Tensor anchors, Tensor? keys, Tensor pool_index, int negative_negative, int negative_anchor,"
    " float temperature, Tensor seed) -> (Tensor mix_lse, Tensor mix_mean)",
)


@dataclass(frozen=True)
class Synthesis:
    """How many hard negatives to synthesise for each anchor.

    Attributes:
        negative_negative: mixes unit(g n_a + (1 - g) n_b) of two different negatives, g ~ U(0, 1).
        negative_anchor: mixes unit(a' a + (1 - a') n) of the anchor and a negative, a' ~ U(0, 0.5).
        pool: how many of the anchor's most similar selected negatives the mixes are drawn from.

    The mixes join the denominator only and are constants: their gradient on the anchor is along the
    mixed vector, and none reaches the keys through them.

    Source: PiCo, TPAMI 2024, hard negative synthesis; formulas after MoCHi, Kalantidis et al., 2020.
    """

    negative_negative: int = 256
    negative_anchor: int = 256
    pool: int = 1024

    def __post_init__(self) -> None:
        checks.integer("negative_negative", self.negative_negative, 0)
        checks.integer("negative_anchor", self.negative_anchor, 0)
        checks.integer("pool", self.pool, 1)

    @property
    def per_anchor(self) -> int:
        """Mixes of one anchor."""
        return self.negative_negative + self.negative_anchor


def check_synthesis(value: object) -> None:
    """Raise unless `value` is a Synthesis or None."""
    if value is not None and not isinstance(value, Synthesis):
        raise TypeError(f"synthesis: expected a Synthesis or None, got {checks.describe(value)}")


def mix_any(
    anchors: Tensor,  # [A, D]
    keys: Tensor | None,  # [K, D]; None: the anchors
    pool_index: Tensor,  # [A, pool] int64 into keys, -1 behind the last
    negative_negative: int,
    negative_anchor: int,
    temperature: float,
    seed: Tensor,  # [] int64
) -> tuple[Tensor, Tensor]:
    """Log-sum of exp(<a, h> / temperature) over the mixes h [A], and their softmax mean [A, D]."""
    keys = anchors if keys is None else keys
    dtype = product_dtype(anchors, keys)
    n_mixes = negative_negative + negative_anchor
    lse = anchors.new_full((anchors.shape[0],), -torch.inf, dtype=dtype)
    mean = anchors.new_zeros(anchors.shape, dtype=dtype)
    if keys.shape[0] == 0 or pool_index.shape[1] == 0:
        return lse, mean
    block = max(1, _BLOCK // (n_mixes * anchors.shape[1]))
    with torch.autocast(anchors.device.type, enabled=False):
        for first in range(0, anchors.shape[0], block):
            here = slice(first, first + block)
            mixed, exists = reference.synthesise(
                anchors[here],
                keys,
                pool_index[here],
                negative_negative,
                negative_anchor,
                seed,
                first_row=first,
            )
            s = torch.bmm(mixed, anchors[here, :, None].to(dtype))[..., 0] / temperature
            s = s.masked_fill_(~exists, -torch.inf)
            lse[here] = s.logsumexp(1)
            weight = torch.exp(s - lse[here, None]).nan_to_num_(0.0)
            mean[here] = torch.bmm(weight[:, None], mixed)[:, 0]
    return lse, mean


torch.library.impl("pico_fast::mix_negatives", "CompositeExplicitAutograd", mix_any)


@torch.library.register_fake("pico_fast::mix_negatives")
def _(anchors, keys, pool_index, negative_negative, negative_anchor, temperature, seed):
    dtype = product_dtype(anchors, anchors if keys is None else keys)
    return anchors.new_empty(anchors.shape[0], dtype=dtype), anchors.new_empty(
        anchors.shape, dtype=dtype
    )
