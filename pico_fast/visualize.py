"""Looking at embeddings and bank, to see whether the contrast learns; pictures need matplotlib."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pico_fast import checks
from pico_fast.bank.memory_bank import MemoryBank
from pico_fast.grid import labels_on_grid
from pico_fast.regions import region_pool

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = ("pca", "tsne", "umap")


def _figure(width: float, height: float, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pico_fast.visualize draws with matplotlib: pip install matplotlib") from error
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def project(
    rows: Tensor,  # [N, D]
    method: str = "pca",
    seed: int = 0,
) -> Tensor:
    """Rows in two dimensions.

    Args:
        rows: [N, D] floating, N at least 2.
        method: "pca": the two directions of largest variance; "tsne" needs scikit-learn, "umap"
            needs umap-learn.
        seed: of the methods that draw.

    Returns:
        [N, 2] float32 on the CPU.

    Raises:
        TypeError, ValueError, ImportError.
    """
    checks.tensor("rows", rows, "[N, D]", "floating")
    checks.choice("method", method, METHODS)
    if rows.shape[0] < 2 or rows.shape[1] < 2:
        raise ValueError(f"rows: expected two rows and channels or more, got {checks.describe(rows)}")
    rows = rows.detach().float().cpu()
    if method == "pca":
        centred = rows - rows.mean(0)
        _, directions = torch.linalg.eigh(centred.T @ centred)
        # the sign of a direction is arbitrary: its largest entry counts as positive
        directions = directions[:, [-1, -2]]
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        return centred @ (directions * largest.sign())
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(rows) - 1) / 3)
        found = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
    else:
        from umap import UMAP

        found = UMAP(2, random_state=seed).fit_transform(rows)
    return torch.as_tensor(found, dtype=torch.float32)


def _on_grid(embeddings: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, int]:
    """Labels at the embeddings' resolution, -1 left out [B, H, W], and the number of classes."""
    checks.tensor("embeddings", embeddings, "[B, D, H, W]", "floating")
    checks.tensor("labels", labels, "[B, h, w]", "integer")
    used = labels[(labels >= 0) & (labels != ignore_index)]
    num_classes = int(used.max()) + 1 if used.numel() else 1
    return labels_on_grid(labels, *embeddings.shape[2:], num_classes, ignore_index), num_classes


def embeddings_by_class(
    embeddings: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, h, w] integer
    class_names: Sequence[str] | None = None,
    ignore_index: int = 255,
    per_class: int = 100,
    method: str = "pca",
    seed: int = 0,
) -> "Figure":
    """A picture of pixel embeddings in two dimensions, coloured by class.

    Args:
        embeddings: [B, D, H, W] floating.
        labels: [B, h, w], any integer dtype and size; negative values and ignore_index are left out.
        class_names: one for each class, or None for their numbers.
        ignore_index: label of pixels to leave out.
        per_class: pixels shown of a class at most, spread evenly over the batch.
        method, seed: see `project`.

    Returns:
        matplotlib Figure.
    """
    checks.integer("per_class", per_class, 1)
    labels, num_classes = _on_grid(embeddings, labels, ignore_index)
    rows = embeddings.detach().movedim(1, 3).flatten(0, 2)
    flat = labels.flatten()
    chosen = []
    for c in range(num_classes):
        pixels = (flat == c).nonzero()[:, 0]
        places = torch.linspace(0, len(pixels) - 1, min(per_class, len(pixels)))
        chosen.append(pixels[places.round().long().to(pixels.device)])
    pixels = torch.cat(chosen)
    if len(pixels) < 2:
        raise ValueError(f"labels: expected two pixels or more with a class, got {len(pixels)}")
    flat = flat[pixels].cpu()
    points = project(rows[pixels], method, seed)
    figure, (axes,) = _figure(7, 6)
    shown = flat.unique().tolist()
    for c in shown:
        here = points[flat == c].numpy()
        name = class_names[c] if class_names else str(c)
        axes.scatter(here[:, 0], here[:, 1], s=8, color=_colour(c), label=name)
    axes.set(title=f"pixel embeddings, {method}", xticks=[], yticks=[])
    if len(shown) <= 40:
        axes.legend(markerscale=2, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _colour(c: int) -> tuple[float, float, float]:
    """A colour for each class; neighbours differ much: hues go round by the golden ratio."""
    from matplotlib.colors import hsv_to_rgb

    return tuple(hsv_to_rgb((c * 0.61803 % 1, 0.55 + 0.4 * (c % 2), 0.55 + 0.15 * (c % 3))))


def class_similarity(
    source: MemoryBank | Tensor,  # the bank, or embeddings [B, D, H, W]
    labels: Tensor | None = None,  # [B, h, w] integer, with embeddings
    class_names: Sequence[str] | None = None,
    ignore_index: int = 255,
) -> tuple["Figure", Tensor]:
    """The inner products of the classes' unit means: of a bank, or of a batch.

    Where the contrast works the diagonal (how far a class's own embeddings agree) is near 1 in every row
    and the rest near 0; all near 1 is a collapse.

    Returns:
        matplotlib Figure, and the matrix [C, C] float32: off the diagonal the inner product of two unit
        means, on it the length of the mean of unit vectors, nan for classes that are not there.
    """
    if isinstance(source, MemoryBank):
        keys, of = source.keys()
        num_classes = source.num_classes
        # one image of one row
        rows, of = keys.T[None, :, None], of[None, None]
    else:
        of, num_classes = _on_grid(source, labels, ignore_index)
        rows = source.detach()
    means, pixels = region_pool(normalize(rows.float(), dim=1), of, num_classes, ignore_index=-1)
    counts = pixels.sum(0)
    means = (means * pixels[..., None]).sum(0) / counts.clamp(min=1)[:, None]
    matrix = normalize(means, dim=1) @ normalize(means, dim=1).T
    matrix.diagonal().copy_(means.norm(dim=1))
    there = counts > 0
    matrix = torch.where(there[:, None] & there, matrix, torch.nan).cpu()
    figure, (axes,) = _figure(6.5, 5.5)
    image = axes.imshow(matrix.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    figure.colorbar(image, label="inner product of unit class means; diagonal: agreement within")
    if num_classes <= 40:
        names = class_names or range(num_classes)
        axes.set_xticks(range(num_classes), names, rotation=90, fontsize="small")
        axes.set_yticks(range(num_classes), names, fontsize="small")
    return figure, matrix


def bank_fill(bank: MemoryBank, class_names: Sequence[str] | None = None) -> "Figure":
    """How full the queues of each class are: bars in percent, pixels and regions."""
    if not isinstance(bank, MemoryBank):
        raise TypeError(f"bank: expected a MemoryBank, got {checks.describe(bank)}")
    figure, (axes,) = _figure(max(5.0, 0.12 * bank.num_classes), 3.5)
    place = torch.arange(bank.num_classes).numpy()
    for shift, name, count, size in (
        (-0.2, "pixels", bank.pixel_count, bank.pixel_queue_size),
        (0.2, "regions", bank.region_count, bank.region_queue_size),
    ):
        if size:
            share = (100 * count.cpu() / size).numpy()
            axes.bar(place + shift, share, 0.4, label=f"{name}, of {size:,} a class")
    axes.set(ylim=(0, 105), ylabel="slots in use, %")
    if bank.num_classes <= 40:
        names = class_names or range(bank.num_classes)
        axes.set_xticks(place, names, rotation=90, fontsize="small")
    else:
        axes.set_xlabel("class")
    axes.legend(fontsize="small")
    return figure


def hardest_negatives(
    images: Tensor,  # [B, 3, H', W']
    embeddings: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, h, w] integer
    pixel: tuple[int, int, int],
    count: int = 8,
    crop: int = 48,
    class_names: Sequence[str] | None = None,
    ignore_index: int = 255,
) -> tuple["Figure", Tensor]:
    """The pixels of other classes that look most like one pixel to the embeddings, as crops of the images.

    Args:
        images: [B, 3, H', W'] floating; brought to [0, 1] by their own smallest and largest value.
        embeddings: [B, D, H, W] floating, unit length along D.
        labels: [B, h, w], any integer dtype and size.
        pixel: (image, row, column) at embedding resolution; it has to have a class.
        count: crops shown; neighbours closer than half a crop are left out.
        crop: their side in pixels of the images.

    Returns:
        matplotlib Figure, and [n, 3] int64: image, row, column of what is shown, hardest first.
    """
    checks.tensor("images", images, "[B, 3, H, W]", "floating")
    labels, _ = _on_grid(embeddings, labels, ignore_index)
    checks.size("images", images, 0, embeddings.shape[0], "images of embeddings")
    height, width = embeddings.shape[2:]
    for part, limit in zip(pixel, labels.shape, strict=True):
        checks.integer("pixel", part, 0, limit - 1)
    own = int(labels[pixel])
    if own < 0:
        raise ValueError(f"pixel: expected a pixel with a class, got {pixel}, which is left out")
    anchor = embeddings[pixel[0], :, pixel[1], pixel[2]].detach()
    similarity = torch.einsum("d,bdhw->bhw", anchor, embeddings.detach()).float()
    similarity = similarity.masked_fill((labels < 0) | (labels == own), -torch.inf)
    scale = images.shape[2] / height, images.shape[3] / width
    apart = [max(1, round(crop / 2 / s)) for s in scale]
    found = []
    while len(found) < count and similarity.max() > -torch.inf:
        b, y, x = (int(i) for i in torch.unravel_index(similarity.argmax(), similarity.shape))
        found.append((b, y, x, float(similarity[b, y, x])))
        rows = slice(max(0, y - apart[0]), y + apart[0] + 1)
        columns = slice(max(0, x - apart[1]), x + apart[1] + 1)
        similarity[b, rows, columns] = -torch.inf
    low, high = images.amin(), images.amax()
    shown = ((images - low) / (high - low).clamp(min=1e-12)).detach().float().cpu()
    places = [(*pixel, 1.0), *found]
    figure, grid = _figure(1.5 * len(places), 2.2, len(places))
    for axes, (b, y, x, value) in zip(grid, places, strict=True):
        centre = round((y + 0.5) * scale[0]), round((x + 0.5) * scale[1])
        top, left = (max(0, c - crop // 2) for c in centre)
        axes.imshow(shown[b, :, top : top + crop, left : left + crop].movedim(0, 2).numpy())
        axes.plot(centre[1] - left, centre[0] - top, "+", color="white", markersize=10)
        c = int(labels[b, y, x])
        name = class_names[c] if class_names else str(c)
        axes.set_title(name if (b, y, x) == tuple(pixel) else f"{name}\n{value:.2f}", fontsize="small")
        axes.set_axis_off()
    return figure, torch.tensor([place[:3] for place in found], dtype=torch.int64).view(-1, 3)


def log_stats(writer: object, criterion: object, step: int | None = None, prefix: str = "pico") -> None:
    """Write a criterion's stats of the last step as scalars; this waits for the device.

    Args:
        writer: anything with `add_scalar(name, value, step)`, such as TensorBoard's SummaryWriter.
        criterion: a PiCoLoss that has run.
        step: None takes the criterion's own.
        prefix: of the names, "pico/positive_similarity" and so on.

    Positive similarity should rise and negative similarity fall; both near 1 is a collapse. The value of
    the loss tells neither: its floor lies far above 0.
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"writer: expected one with add_scalar, got {checks.describe(writer)}")
    if not isinstance(getattr(criterion, "stats", None), dict):
        raise TypeError(f"criterion: expected a PiCoLoss, got {type(criterion).__name__}")
    step = int(criterion.step) if step is None else checks.integer("step", step, 0)
    for name, value in criterion.stats.items():
        writer.add_scalar(f"{prefix}/{name}", float(value), step)
