"""Which keys an anchor is compared with, as the caller says it: words and counts, checked once."""

import math
from dataclasses import dataclass

from pico_fast import checks

SAMPLINGS = ("all", "random", "hardest", "semi_hard", "bounded")
# how positives may be chosen, and how each sampling chooses them where nothing else is said
POSITIVES = ("all", "random", "hardest", "semi_hard")
_USUAL = {name: name for name in POSITIVES} | {"bounded": "random"}


@dataclass(frozen=True)
class Selection:
    """Which positives and which negatives an anchor is compared with, and how many of them at most.

    Attributes:
        positives: "all", "random", "hardest" or "semi_hard".
        negatives: one of these, or "bounded".
        num_positives, num_negatives: of an anchor at most; "all" knows no limit, "random" a soft one.
        hard_fraction: share of an anchor's sampled keys that "semi_hard" and "bounded" take, (0, 1].
    """

    positives: str
    negatives: str
    num_positives: int
    num_negatives: int
    hard_fraction: float

    def __post_init__(self) -> None:
        checks.choice("positives", self.positives, POSITIVES)
        checks.choice("negatives", self.negatives, SAMPLINGS)

    def count(self, own: bool) -> int:
        """The limit of one side: the positives' (`own`) or the negatives'."""
        return self.num_positives if own else self.num_negatives

    def strategy(self, own: bool) -> str:
        """How one side is chosen: the positives (`own`) or the negatives."""
        return self.positives if own else self.negatives

    def needed(self, own: bool) -> int | None:
        """Keys that the sample of one side has to offer an anchor; None where all keys take part."""
        if self.strategy(own) in ("all", "hardest"):
            return None
        return math.ceil(self.count(own) / self.hard_fraction) if self.is_cut(own) else self.count(own)

    def is_cut(self, own: bool) -> bool:
        """Whether of the sampled keys a share counts: the hardest of them."""
        return self.strategy(own) in ("semi_hard", "bounded")


def check_selection(
    sampling: object, positives: object, num_positives: object, num_negatives: object, hard_fraction: object
) -> Selection:
    """The selection that these options mean; raises unless they are possible ones."""
    checks.choice("sampling", sampling, SAMPLINGS)
    checks.choice("positives", positives, (None, *POSITIVES))
    checks.integer("num_positives", num_positives, 1)
    checks.integer("num_negatives", num_negatives, 1)
    hard_fraction = checks.number("hard_fraction", hard_fraction, above=0.0, maximum=1.0)
    chosen = _USUAL[sampling] if positives is None else positives
    return Selection(chosen, sampling, num_positives, num_negatives, hard_fraction)


# every key, as the losses of the authors' ports compare
EVERYTHING = Selection("all", "all", 1, 1, 1.0)
