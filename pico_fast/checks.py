"""Argument checks: every message names the argument, what was expected and what came."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def describe(value: object) -> str:
    """A value in a few words: shape, dtype and device of a tensor, the value itself otherwise."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# named one by one: a quantized dtype is neither floating nor complex, and no number of a class
INTEGER = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))


def tensor(name: str, value: object, layout: str, kind: str) -> Tensor:
    """`value` if it is a dense tensor laid out as `layout` ("[B, D, H, W]"), "floating" or "integer"."""
    expected = f"{layout} {kind} tensor"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a {expected}, got {describe(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense {expected}, got layout {value.layout}")
    if kind == "floating" and value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected a {expected} (float32, bfloat16, float16, float64), got {describe(value)}"
        )
    if kind == "integer" and value.dtype not in INTEGER:
        raise TypeError(f"{name}: expected a {expected}, got {describe(value)}")
    if value.dim() != layout.rpartition("[")[2].count(",") + 1:
        raise ValueError(f"{name}: expected a {expected}, got {describe(value)}")
    eager = kind == "floating" and not torch.compiler.is_compiling()
    # some ops would drop the tangent without a word
    if eager and torch.autograd.forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{name}: expected a tensor without a tangent: forward-mode differentiation is not"
            " supported, backward() is"
        )
    return value


def size(name: str, value: Tensor, dim: int, expected: int, why: str) -> None:
    """Raise unless `value` has `expected` entries along `dim`; `why` says where the number is from."""
    if value.shape[dim] != expected:
        raise ValueError(
            f"{name}: expected size {expected} along dimension {dim} ({why}), got {describe(value)}"
        )


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected device {other.device} (that of {other_name}), got {describe(value)}"
        )


def integer(name: str, value: object, minimum: int | None = None, maximum: int | None = None) -> int:
    """`value` if it is a Python integer in [minimum, maximum]."""
    bounds = f" >= {minimum}" if minimum is not None else ""
    bounds += f" <= {maximum}" if maximum is not None else ""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an integer{bounds}, got {describe(value)}")
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        raise ValueError(f"{name}: expected an integer{bounds}, got {value}")
    return value


def number(
    name: str,
    value: object,
    above: float = -math.inf,
    minimum: float = -math.inf,
    maximum: float = math.inf,
) -> float:
    """`value` if it is a finite real number with `above` < value and minimum <= value <= maximum."""
    limits = [(">", above), (">=", minimum), ("<=", maximum)]
    bounds = "".join(f" {sign} {limit:g}" for sign, limit in limits if math.isfinite(limit))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number{bounds}, got {describe(value)}")
    if not (math.isfinite(value) and above < value and minimum <= value <= maximum):
        raise ValueError(f"{name}: expected a finite number{bounds}, got {value}")
    return float(value)


def floating_dtype(name: str, value: object) -> None:
    """Raise unless `value` is one of the dtypes that embeddings are kept in."""
    if value not in FLOATING:
        raise TypeError(f"{name}: expected one of {FLOATING}, got {value!r}")


def choice(name: str, value: object, options: Iterable[str | None]) -> None:
    """Raise unless `value` is one of `options`."""
    options = tuple(options)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {options}, got {describe(value)}")
    if value not in options:
        raise ValueError(f"{name}: expected one of {options}, got {value!r}")


def flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")


def first_order(name: str) -> None:
    """Raise where a backward is recorded: to differentiate it again would take it for a constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name}: expected a backward without create_graph=True; the gradient is made in the"
            f" forward and cannot be differentiated again (that of {name}(impl='reference') can)"
        )


def implementation(value: object) -> bool:
    """Whether `impl` asks for the reference; None means the fast implementation of the device."""
    choice("impl", value, (None, "reference"))
    return value == "reference"


def seed(value: object, device: torch.device) -> Tensor:
    """`seed`, a Python integer of 64 bits or a 0-d int64 tensor, as a 0-d int64 tensor on `device`."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"seed: expected an integer or a 0-d int64 tensor, got {describe(value)}")
        if value.dim() != 0:
            raise ValueError(f"seed: expected an integer or a 0-d int64 tensor, got {describe(value)}")
        if value.device != device:
            raise ValueError(f"seed: expected a tensor on {device}, got {describe(value)}")
        return value
    integer("seed", value, -(2**63), 2**63 - 1)
    return torch.full((), value, dtype=torch.int64, device=device)


def classes(num_classes: object, ignore_index: object) -> None:
    """Raise unless there is at least one class and `ignore_index` is none of them."""
    integer("num_classes", num_classes, 1, 65_535)
    integer("ignore_index", ignore_index)
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index: expected a value outside the classes 0 to {num_classes - 1}, got {ignore_index}"
        )
