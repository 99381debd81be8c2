"""Draws: a named hash of (seed, step, what is drawn, counters) in place of a generator.

Every draw of the package is a 32-bit word of `hash32`. The same words come out in Python, C++ and Triton,
on every device and rank: the same seed and step draw the same anchors, samples, mixes and bank writes.
"""

from torch import Tensor

# what is drawn; the number is part of every draw's counter
ANCHOR_PAIR, ANCHOR_PIXEL, ANCHOR_EASY, BANK_PIXEL = 1, 2, 3, 4
POSITIVE, NEGATIVE, STEP = 5, 6, 12
MIX_FIRST, MIX_SECOND, MIX_SHARE, MIX_WITH_ANCHOR, MIX_ANCHOR_SHARE = 7, 8, 9, 10, 11

WORD = 0xFFFFFFFF


def lowbias32(x):
    """The integer hash lowbias32 with the multipliers 0x21f0aaad and 0x735a2d97: a bijection of 32 bits.

    For Python integers and int64 tensors; both multipliers are below 2^31: no product leaves int64.
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & WORD
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & WORD
    return x ^ (x >> 15)


def fold(state, word):
    """One more 32-bit word into a hash state; for a given state a bijection of the word."""
    return lowbias32(((state ^ (word & WORD)) + 0x9E3779B9) & WORD)


def hash32(seed, stream, *counters):
    """Uniform 32-bit word for (seed, what is drawn, counters): integers or int64 tensors, broadcast."""
    state = fold(fold(fold(0, seed), seed >> 32), stream)
    for counter in counters:
        state = fold(state, counter)
    return state


def step_seed(seed, step):
    """The seed of one step, 63 bits: what modules pass to functions that take a seed."""
    low, high = (hash32(seed, STEP, step, step >> 32, half) for half in (0, 1))
    return low | ((high & 0x7FFFFFFF) << 32)


def below(word, n):
    """Uniform integer in [0, n) from a 32-bit word, n < 2^31."""
    return (word * n) >> 32


def uniform(word: Tensor) -> Tensor:
    """Uniform float32 in [0, 1) from a 32-bit word: its upper 24 bits, exact."""
    return (word >> 8).float() * 2.0**-24
