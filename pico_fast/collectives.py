"""Ranks: the processes that train together, and the collectives that the package asks them for.

Every collective has a size that all ranks know beforehand, so a rank without an anchor, or without an
image, takes part like any other. What is called `start_...` returns at once; the function that it
returns waits (on a GPU: makes the stream wait) and gives the result.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributed as dist

from pico_fast import checks

PLACEMENTS = ("local", "replicated", "sharded")


def check_placement(process_group: object, placement: object) -> None:
    """Raise unless these are a process group or None, and a placement."""
    checks.choice("placement", placement, PLACEMENTS)
    is_group = dist.is_available() and isinstance(process_group, dist.ProcessGroup)
    if process_group is not None and not is_group:
        raise TypeError(
            f"process_group: expected a ProcessGroup or None, got {checks.describe(process_group)}"
        )


class Ranks:
    """Ranks that share a bank; one alone where there is no process group, or placement is "local".

    Args:
        process_group: None is the default group, if there is one when a rank is asked for.
        placement: "local", "replicated" or "sharded".
    """

    def __init__(self, process_group: "dist.ProcessGroup | None", placement: str) -> None:
        self.group = process_group
        self.placement = placement

    def __deepcopy__(self, memo: dict) -> "Ranks":
        return Ranks(self.group, self.placement)  # a copy talks to the same ranks

    @property
    def together(self) -> bool:
        """Whether there is a group whose ranks have a bank in common."""
        return self.placement != "local" and dist.is_available() and dist.is_initialized()

    @property
    def size(self) -> int:
        """N, ranks that have a bank in common."""
        return dist.get_world_size(self.group) if self.together else 1

    @property
    def rank(self) -> int:
        """This rank's place among them, from 0."""
        return dist.get_rank(self.group) if self.together else 0

    def share(self, n: int) -> tuple[int, int]:
        """First and last of this rank's part of n things, cut as `torch.chunk` and DTensor cut."""
        part = -(-n // self.size)
        return min(self.rank * part, n), min((self.rank + 1) * part, n)

    def _start(self, name: str, older: str, out: Tensor, x: Tensor) -> Callable[[], Tensor]:
        # the name that this version of torch does not warn of
        collective = getattr(dist, name, None) or getattr(dist, older)
        x = x.contiguous()
        if torch.compiler.is_compiling():  # a compiler orders collectives itself
            collective(out, x, group=self.group)
            return lambda: out
        work = collective(out, x, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return out

        return wait

    def start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """x [n, ...] of all ranks, in rank order: [N·n, ...]."""
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        return self._start("all_gather_single", "all_gather_into_tensor", out, x)

    def start_sum_own(self, x: Tensor) -> Callable[[], Tensor]:
        """The sum over ranks of this rank's part [n, ...] of x [N·n, ...]."""
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        return self._start("reduce_scatter_single", "reduce_scatter_tensor", out, x)

    def gather(self, x: Tensor) -> Tensor:
        """`start_gather`, waited for."""
        return self.start_gather(x)()

    def exchange(self, x: Tensor) -> Tensor:
        """Part r of x [N·n, ...] goes to rank r; what came from rank r is part r: [N·n, ...]."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=self.group)
        return out

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, as a new tensor."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def maximum(self, x: Tensor) -> Tensor:
        """The largest of all ranks' x, value by value, as a new tensor."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, operation: "dist.ReduceOp.RedOpType") -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, operation, group=self.group)
        return out

    def whole(self, part: Tensor, dim: int, n: int) -> Tensor:
        """A DTensor of n along `dim`, of which every rank holds its share in the memory of `part`."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self.group or dist.group.WORLD, part.device.type)
        shape = torch.Size([*part.shape[:dim], n, *part.shape[dim + 1 :]])
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(part, mesh, [Shard(dim)], shape=shape, stride=strides)

    def own_part(self, whole: Tensor, dim: int, first: int, last: int) -> Tensor:
        """`first` to `last` along `dim` of a tensor that is here, or lies on many ranks as a DTensor."""
        if hasattr(whole, "full_tensor"):
            local = whole.to_local()
            if self.size == whole.device_mesh.size() and local.shape[dim] == last - first:
                return local
            whole = whole.full_tensor()
        return whole.narrow(dim, first, last - first)
