"""Synthesis: extra negatives mixed from an anchor's hard ones."""

from dataclasses import dataclass

from pico_fast import checks


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
