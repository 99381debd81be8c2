"""The sample: some keys of every class, drawn once a step for all anchors. A smaller layout.

For the positives it holds as many of each class as an anchor needs. For the negatives it holds the same
share of every class, so large that even an anchor of the largest class meets as many as it needs. So every
class is there. `reference.sample_keys` says which keys these are.
"""

from torch import Tensor

from pico_fast.selection import ops
from pico_fast.selection.layout import Layout
from pico_fast.selection.options import Selection


def draw_sample(
    layout: Layout,
    selection: Selection,
    own: bool,
    seed: Tensor,  # [] int64
    slots: int | None,  # places of a class in a bank; None: keys with labels, of which one may have all
) -> Layout:
    """The sample of one side: some keys of each class of `layout`, their places as positions."""
    n_classes = layout.ranges.shape[0]
    n_keys = layout.keys.shape[0] if slots is None else n_classes * slots
    # more than all keys cannot be needed, and products of counts stay within int64
    need = min(selection.needed(own), max(1, n_keys))
    capacity = n_keys
    if slots is not None and own:
        capacity = n_classes * min(need, slots)
    elif slots is not None:
        # the same share of the largest class comes on top, and of each class a part of a key
        capacity = min(n_keys, need + slots + n_classes)
    classes = (layout.ranges, layout.names, layout.key_order)
    key_order, ranges = ops.sample_keys(*classes, need, own, seed, capacity)
    return layout._replace(key_order=key_order, ranges=ranges)
