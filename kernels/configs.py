"""Launch settings: data, by GPU generation, bytes of a value and (padded) channels.

A row is (BM anchors, BN keys, warps, stages). With the Triton of requirements-dev.lock every row compiles
without spilled registers and within the shared memory of its cards; `tests/test_kernels_compile.py` holds
them to it and prints the table.
No row was timed on a GPU yet: each was chosen by its resources alone.
"""

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """How a kernel is launched."""

    BM: int  # anchors of a block
    BN: int  # keys of a tile
    num_warps: int
    stages: int  # tiles under way


# The pass over the negatives, keys through the copy engine where there is one: (generation, bytes,
# channels). Generations that are not named take the rows of the first.
NEGATIVES = {
    (80, 2, 64): Launch(64, 64, 4, 3),
    (80, 2, 128): Launch(128, 64, 8, 4),
    (80, 2, 256): Launch(64, 64, 8, 3),
    (80, 2, 512): Launch(32, 32, 8, 2),
    (80, 4, 64): Launch(32, 32, 8, 2),
    (80, 4, 128): Launch(64, 64, 8, 2),
    (80, 4, 256): Launch(64, 32, 8, 2),
    (80, 4, 512): Launch(16, 16, 4, 2),
    (86, 2, 256): Launch(64, 64, 8, 2),
    (86, 2, 512): Launch(32, 16, 8, 2),
    (86, 4, 256): Launch(32, 32, 4, 2),
    (90, 2, 64): Launch(128, 128, 8, 3),
    # 128 anchors by 64 keys is what fits beside 256 channels of sums
    (90, 2, 256): Launch(128, 64, 8, 3),
    (90, 2, 512): Launch(64, 64, 8, 2),
    (90, 4, 64): Launch(64, 64, 8, 2),
    (90, 4, 512): Launch(32, 32, 8, 2),
    (100, 2, 256): Launch(64, 64, 8, 2),
    (100, 2, 512): Launch(32, 32, 4, 2),
    (100, 4, 64): Launch(64, 32, 8, 2),
    (100, 4, 128): Launch(64, 32, 8, 2),
    (100, 4, 256): Launch(32, 32, 4, 2),
    (100, 4, 512): Launch(32, 32, 8, 2),
}

# The same without the copy engine, with a running maximum, or with channels between the columns, where
# that needs more registers.
NEGATIVES_WIDE = {
    (90, 2, 64): Launch(64, 64, 8, 3),
    (90, 2, 256): Launch(64, 64, 8, 3),
    (90, 4, 256): Launch(32, 32, 4, 2),
    (100, 2, 64): Launch(64, 32, 4, 3),
    (100, 2, 128): Launch(64, 64, 8, 3),
    (100, 2, 256): Launch(64, 32, 8, 3),
    (100, 2, 512): Launch(32, 16, 8, 2),
}

# Whether `all_keys` takes the whole tiles of a bank of bfloat16 with 256 channels on sm_90, with this row.
# Off until it was measured faster than the row above.
USE_ALL_KEYS = False
ALL_KEYS = Launch(128, 64, 4, 4)

# Where the cut of a sample, whose two kernels share their tiles, needs more registers than all keys.
CUT = {
    (80, 2, 128): Launch(64, 64, 8, 3),
    (86, 2, 128): Launch(64, 64, 8, 3),
    (86, 2, 256): Launch(64, 32, 8, 2),
    (90, 2, 64): Launch(128, 64, 8, 3),
    (100, 2, 512): Launch(32, 16, 8, 2),
}

# The pass over the own class, a small part of the keys: small tiles do for every generation.
POSITIVES = {
    (2, 64): Launch(32, 64, 8, 2),
    (2, 128): Launch(64, 32, 8, 2),
    (2, 256): Launch(64, 32, 8, 2),
    (2, 512): Launch(32, 32, 8, 2),
    (4, 64): Launch(16, 32, 4, 2),
    (4, 128): Launch(16, 32, 8, 2),
    (4, 256): Launch(16, 16, 8, 2),
    (4, 512): Launch(16, 16, 4, 2),
}

# The same where one generation takes another row, without a cut or with one. In a small block few anchors
# wait while the keys of another's class are read.
POSITIVES_OF = {
    (80, 2, 256, True): Launch(32, 64, 8, 1),
    (86, 4, 512, False): Launch(16, 16, 8, 1),
    (90, 2, 128, False): Launch(32, 32, 4, 2),
    (90, 2, 256, False): Launch(32, 32, 4, 2),
    (100, 2, 64, False): Launch(32, 32, 8, 2),
    (100, 2, 128, False): Launch(32, 64, 4, 2),
    (100, 2, 256, False): Launch(32, 32, 4, 2),
}

# The keys' side of the gradient: anchors of a step, keys of a block.
KEYS_GRAD = {
    (2, 64): Launch(32, 32, 4, 2),
    (2, 128): Launch(64, 32, 8, 2),
    (2, 256): Launch(64, 32, 8, 2),
    (2, 512): Launch(16, 32, 8, 2),
    (4, 64): Launch(64, 32, 8, 2),
    (4, 128): Launch(32, 16, 4, 2),
    (4, 256): Launch(32, 32, 8, 2),
    (4, 512): Launch(16, 16, 4, 2),
}

# The walks of `hardest`: anchors of a block, keys of a tile.
HARDEST = {
    (2, 64): Launch(64, 64, 8, 2),
    (2, 128): Launch(64, 64, 8, 2),
    (2, 256): Launch(64, 64, 8, 2),
    (2, 512): Launch(64, 32, 8, 1),
    (4, 64): Launch(64, 32, 8, 2),
    (4, 128): Launch(32, 32, 8, 2),
    (4, 256): Launch(64, 32, 8, 1),
}

# Anchors of a block and warps of the walk that writes bits, where they are others, by side (own class or
# not). The walk over the negatives is one over all keys: each block reads every key from the L2 cache.
HITS = {
    (80, 2, 256, False): (128, 8),
    (90, 2, 64, False): (256, 16),
    (90, 2, 128, False): (256, 16),
    (90, 2, 256, False): (256, 16),
    (100, 2, 64, False): (64, 4),
    (100, 2, 64, True): (64, 4),
    (100, 2, 128, False): (64, 4),
    (100, 2, 128, True): (64, 4),
    (100, 2, 256, False): (128, 8),
}

# merge_kernel: rows of a block
MERGE = Launch(4, 0, 4, 1)


def _width(channels: int) -> int:
    """The column of the tables for so many channels."""
    return max(64, 1 << (channels - 1).bit_length())


def family(generation: int) -> int:
    """Whose rows a GPU takes: consumer cards have less shared memory than those of the datacentre."""
    if generation in (86, 87, 89) or generation >= 120:
        return 86
    return min(max(generation // 10 * 10, 80), 100)


def cut(generation: int, dtype: torch.dtype, channels: int) -> Launch:
    """Settings of similarity_kernel and negatives_kernel with a cut."""
    row = CUT.get((family(generation), dtype.itemsize, _width(channels)))
    return negatives(generation, dtype, channels, False, False) if row is None else row


def negatives(generation: int, dtype: torch.dtype, channels: int, running: bool, by_rows: bool) -> Launch:
    """Settings of negatives_kernel with all keys."""
    shape = (dtype.itemsize, _width(channels))
    row, first = (family(generation), *shape), (80, *shape)
    # masks of padded channels cost registers as well
    if (running or by_rows or channels != _width(channels)) and row in NEGATIVES_WIDE:
        return NEGATIVES_WIDE[row]
    return NEGATIVES.get(row, NEGATIVES[first])


def positives(generation: int, dtype: torch.dtype, channels: int, is_cut: bool) -> Launch:
    """Settings of positives_kernel."""
    shape = (dtype.itemsize, _width(channels))
    return POSITIVES_OF.get((family(generation), *shape, is_cut), POSITIVES[shape])


def keys_grad(dtype: torch.dtype, channels: int) -> Launch:
    """Settings of keys_grad_kernel."""
    return KEYS_GRAD[dtype.itemsize, _width(channels)]


def hardest(dtype: torch.dtype, channels: int) -> Launch:
    """Settings of the walks of `hardest`."""
    return HARDEST[dtype.itemsize, _width(channels)]


def hits(generation: int, dtype: torch.dtype, channels: int, own: bool) -> Launch:
    """Settings of hits_kernel: the tiles of the other walks."""
    launch = hardest(dtype, channels)
    row = HITS.get((family(generation), dtype.itemsize, _width(channels), own))
    return launch if row is None else launch._replace(BM=row[0], num_warps=row[1])


def cut_warps(places: int) -> int:
    """Warps of a program that holds so many halves of a row: few, since each adds up at every step."""
    return 4 if places <= 2**15 else 8


def pick_warps(capacity: int) -> int:
    """Warps of a program that holds so many numbers of an anchor: few, since each adds up at every step."""
    return min(16, max(4, capacity // 1024))
