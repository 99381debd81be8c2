"""Ranks as threads of one process: the package's collectives over a board that all of them see.

So that several ranks run on one device, and fast; tests/test_ranks.py runs the real collectives.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from pico_fast import collectives
from pico_fast.bank import memory_bank


class VirtualRanks(collectives.Ranks):
    """One of several threads that play ranks."""

    def __init__(self, placement, board, barrier, rank):
        super().__init__(None, placement)
        self.board, self.barrier, self._rank = board, barrier, rank

    def __deepcopy__(self, memo):
        return VirtualRanks(self.placement, self.board, self.barrier, self._rank)

    size = property(lambda self: 1 if self.placement == "local" else len(self.board))
    rank = property(lambda self: 0 if self.placement == "local" else self._rank)

    def _all(self, x):
        """What all ranks bring, in rank order."""
        self.barrier.wait()
        self.board[self._rank] = x
        self.barrier.wait()
        found = list(self.board)
        assert len({(y.shape, y.dtype) for y in found}) == 1, "collectives of one size"
        return found

    def start_gather(self, x):
        out = torch.cat(self._all(x))
        return lambda: out

    def start_sum_own(self, x):
        out = torch.stack([y.chunk(self.size)[self._rank] for y in self._all(x)]).sum(0)
        return lambda: out

    def exchange(self, x):
        return torch.cat([y.chunk(self.size)[self._rank] for y in self._all(x)])

    def sum(self, x):
        return torch.stack(self._all(x)).sum(0, dtype=x.dtype)

    def maximum(self, x):
        return torch.stack(self._all(x)).amax(0)


def run(n, work, monkeypatch):
    """Results of work(rank) of n ranks whose banks, made inside, know one another."""
    board, barrier, here = [None] * n, threading.Barrier(n, timeout=60), threading.local()

    def make(group, placement):
        return VirtualRanks(placement, board, barrier, here.rank)

    def one(rank):
        here.rank = rank
        try:
            return work(rank)
        except BaseException:
            barrier.abort()
            raise

    with monkeypatch.context() as patch, ThreadPoolExecutor(n) as pool:
        patch.setattr(memory_bank, "Ranks", make)
        return [future.result() for future in [pool.submit(one, rank) for rank in range(n)]]
