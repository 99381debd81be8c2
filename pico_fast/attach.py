"""The tap: catches the features before a model's classifier and projects them, in training only."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pico_fast import checks
from pico_fast.projection import ProjectionHead

# under this name the tap is a submodule of the model, so that optimizers, wrappers and checkpoints see it
NAME = "pico_fast_tap"
# these know the parameters of what they wrap already
WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


@dataclass(frozen=True)
class Place:
    """Where a known model has its features: `path` as for `attach`, in classes from `library`."""

    library: str  # how the name of the model's Python module begins
    path: str
    # tokens behind those of the pixels
    class_tokens: Callable[[nn.Module], int] = lambda model: 0


KNOWN = (
    # DeepLabV3 and FCN
    Place("torchvision.models.segmentation", "classifier.4"),
    # DeepLabV3+, UPerNet, Unet, FPN, SegFormer and others on any encoder, timm's included
    Place("segmentation_models_pytorch", "segmentation_head.0"),
    # SegFormer, UPerNet
    Place("transformers.models", "decode_head.classifier"),
    # MobileNetV2 with DeepLabV3+
    Place("transformers.models", "segmentation_head.classifier.convolution"),
    # MaskFormer, Mask2Former: the features that masks are products with
    Place("transformers.models", "model.pixel_level_module.decoder.mask_projection:output"),
    # HRNet, DeepLabV3, SegFormer and most others; OCRNet's second head; Segmenter's mask transformer
    Place("mmseg.models", "decode_head.conv_seg"),
    Place("mmseg.models", "decode_head.1.conv_seg"),
    Place("mmseg.models", "decode_head.decoder_norm:output", lambda model: model.decode_head.num_classes),
)


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The submodule, or None; what a module refuses to be asked for is none as well."""
    try:
        return model.get_submodule(path.partition(":")[0])
    except AttributeError:
        return None


def candidates(model: nn.Module) -> list[str]:
    """Paths that look like classifiers: the last convolution or linear layer of each child of the model."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            found[path.partition(".")[0]] = path
    return list(found.values())


def _place(model: nn.Module) -> Place:
    """Where to tap a model that is known."""
    library = type(model).__module__
    for place in KNOWN:
        module = _module_at(model, place.path)
        # a cascade's last head is not its first
        if library.startswith(place.library) and isinstance(module, nn.Conv2d | nn.LayerNorm):
            return place
    raise ValueError(
        "tap: expected the path of the module whose input are the features, or 'path:output', got None:"
        f" {library}.{type(model).__name__} is not known. Candidates: {candidates(model) or 'none'}"
    )


def _channels(module: nn.Module, side: str) -> int | None:
    """Channels of what goes into a module, or comes out of it; None where it cannot be told."""
    layers = [m for m in module.modules() if hasattr(m, "weight")]
    for layer in layers[:1] if side == "input" else layers[-1:]:
        if isinstance(layer, nn.LayerNorm):
            return layer.normalized_shape[-1]
        for kind, words in (
            (nn.modules.conv._ConvNd, ("in_channels", "out_channels")),
            (nn.Linear, ("in_features", "out_features")),
            (nn.modules.batchnorm._NormBase, ("num_features", "num_features")),
        ):
            if isinstance(layer, kind):
                return getattr(layer, words[side == "output"])
    return None


def as_map(
    features: Tensor,  # [B, D, H, W], or tokens [B, N, D]
    grid: tuple[int, int] | None,
    class_tokens: int,
) -> Tensor:
    """Features as a map [B, D, H, W]; tokens of pixels stand first, row by row."""
    if not isinstance(features, Tensor) or features.dim() not in (3, 4):
        got = checks.describe(features)
        raise ValueError(f"tap: expected features [B, D, H, W] or tokens [B, N, D], got {got}")
    if features.dim() == 4:
        return features
    n = features.shape[1] - class_tokens
    height, width = grid or (math.isqrt(n), math.isqrt(n))
    if height * width != n and (grid is None or height * width > n):
        raise ValueError(
            f"grid: expected (height, width) of the {n} tokens of the tapped module, got {grid}"
        )
    return features[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


class _Tie(torch.autograd.Function):
    """The features, with the embeddings on their graph.

    DDP with find_unused_parameters looks for parameters from the model's outputs back; without the tie it
    takes the head for unused, and fails when its gradients come all the same.
    """

    @staticmethod
    def forward(
        ctx: object,
        features: Tensor,  # any shape
        embeddings: Tensor,  # [B, D, H, W]
    ) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Tap(nn.Module):
    """What `attach` puts into a model: the projection head, and the embeddings of the last forward.

    Attributes:
        head: the `ProjectionHead`.
        path: where the features are caught.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        head: ProjectionHead,
        grid: tuple[int, int] | None,
        class_tokens: int,
    ) -> None:
        super().__init__()
        self.head = head
        self.path = path
        self.grid = grid
        self.class_tokens = class_tokens
        self._caught: Tensor | None = None
        # in a tuple, or it would become a submodule of its own submodule
        self._model = (model,)

    def forward(self, x: Tensor) -> Tensor:
        """The argument: in an nn.Sequential the tap is one more layer."""
        return x

    def _from_input(self, module: nn.Module, args: tuple) -> tuple:
        if not args:
            raise ValueError(f"tap at {self.path!r}: called by keyword alone; use 'path:output'")
        return self._catch(module, args, args[0]), *args[1:]

    def _catch(self, module: nn.Module, args: tuple, features: Tensor) -> Tensor:
        """The features as they are; in training their embeddings are kept, on the graph of the outputs."""
        if not (self.training and torch.is_grad_enabled()):
            return features
        # here and not in `embeddings`: wrappers see the head used inside the model's forward
        self._caught = self.head(as_map(features, self.grid, self.class_tokens))
        return _Tie.apply(features, self._caught)

    def embeddings(self) -> Tensor:
        """Embeddings [B, D, H, W] of the last forward, once; D is embedding_dim.

        Raises:
            RuntimeError: the model has not run in training mode, with gradients, since the last call.
        """
        caught, self._caught = self._caught, None
        if caught is None:
            raise RuntimeError(
                f"tap at {self.path!r}: no features since the last call; run the model in training"
                " mode with gradients enabled (a module inside a reentrant checkpoint runs without:"
                " use_reentrant=False)"
            )
        return caught

    def detach(self) -> nn.Module:
        """Take the tap out and return the model as it was before `attach`: no hook, no extra parameter.

        Raises:
            RuntimeError: the tap is not in its model any more.
        """
        (model,) = self._model
        if getattr(model, NAME, None) is not self:
            raise RuntimeError(f"tap at {self.path!r}: it is detached already")
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if getattr(hook, "__self__", None) is self:
                        del hooks[key]
        delattr(model, NAME)
        self._caught = None
        return model

    def __getstate__(self) -> dict:
        # what was caught belongs to a graph that neither a copy nor a file can have
        return {**self.__dict__, "_caught": None}


def attach(
    model: nn.Module,
    tap: str | None = None,
    embedding_dim: int = 256,
    in_channels: int | None = None,
    grid: tuple[int, int] | None = None,
) -> Tap:
    """Catch the features before a model's classifier, and project them to embeddings.

        tap = pico_fast.attach(model)
        loss = joint(model(images), tap.embeddings(), labels)

    The tap becomes a submodule of the model: `model.parameters()`, `state_dict`, `to`, DDP, deep copies and
    `torch.save` take its projection head along. In eval mode it does nothing. Attach before wrapping
    (DDP, FSDP) or compiling the model and before making the optimizer.

    Args:
        model: any segmentation network.
        tap: path of the module whose first input are the features ("classifier.4"), or "path:output" for
            what it returns; None finds it in models of torchvision, segmentation_models_pytorch,
            transformers and mmsegmentation.
        embedding_dim: D, channels of the embeddings; the criterion's.
        in_channels: channels of the features; None reads them off the tapped module.
        grid: (height, width) of the pixels' tokens where features are tokens [B, N, channels]; None
            takes a square.

    Returns:
        Tap: `tap.embeddings()` after each forward gives [B, D, H, W]; `tap.detach()` gives the bare model.

    Raises:
        TypeError, ValueError: no such module, a model that has a tap already, one that is not known.

    Source: Wang et al., ICCV 2021, section 3.3: the head is used in training only.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {checks.describe(model)}")
    if isinstance(model, WRAPPERS) or "_orig_mod" in model._modules:
        raise TypeError(f"model: expected one not yet wrapped or compiled, got a {type(model).__name__}")
    if isinstance(getattr(model, NAME, None), Tap):
        raise ValueError(
            f"model: expected one without a tap, got one at {getattr(model, NAME).path!r};"
            " call its detach() first"
        )
    if tap is not None and not isinstance(tap, str):
        raise TypeError(f"tap: expected a module's path or None, got {checks.describe(tap)}")
    place = _place(model) if tap is None else Place("", tap)
    path, _, side = place.path.partition(":")
    if side not in ("", "input", "output"):
        raise ValueError(f"tap: expected 'path' or 'path:output', got {tap!r}")
    side = side or "input"
    module = _module_at(model, path)
    if module is None or not path:
        raise ValueError(
            f"tap: expected the path of a module, got {tap!r}; candidates: {candidates(model) or 'none'}"
        )
    if grid is not None:
        if not isinstance(grid, tuple) or len(grid) != 2:
            raise TypeError(f"grid: expected (height, width) or None, got {checks.describe(grid)}")
        grid = tuple(checks.integer("grid", size, 1) for size in grid)
    channels = in_channels if in_channels is not None else _channels(module, side)
    if channels is None:
        raise ValueError(
            f"in_channels: expected a number: the channels of the {side} of {path!r}"
            f" ({type(module).__name__}) cannot be read off it"
        )
    head = ProjectionHead(channels, embedding_dim)
    weight = next(model.parameters(), None)
    if weight is not None:
        head = head.to(weight.device, weight.dtype if weight.is_floating_point() else None)
    made = Tap(model, place.path, head, grid, place.class_tokens(model))
    made.train(model.training)
    model.add_module(NAME, made)
    if side == "input":
        module.register_forward_pre_hook(made._from_input)
    else:
        module.register_forward_hook(made._catch)
    return made
