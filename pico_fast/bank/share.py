"""A share: what one rank holds of a bank."""

from typing import NamedTuple

from torch import Tensor

from pico_fast.collectives import Ranks


class Share(NamedTuple):
    """What a rank holds of a bank: all of it, or of every class the slots `first` to `last`."""

    keys: Tensor  # [C·(last - first), D]
    ranges: Tensor  # [C, 2, 2] int64, where keys in use stand here: first row and length, of each queue
    all_ranges: Tensor  # [C, 2, 2] int64, where they stand in the whole bank
    slots: int  # of a class in the whole bank
    first: int
    ranks: Ranks | None  # those that hold the rest; None: nothing is elsewhere
