"""The method whole: anchors of this batch against the bank of all images seen before."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from pico_fast import checks, draws, reference
from pico_fast.anchors import check_sizes, draw_anchors
from pico_fast.bank.memory_bank import MemoryBank
from pico_fast.contrast.function import ContrastRows, Settings, contrast_rows
from pico_fast.grid import check_predictions, labels_on_grid, predictions_on_grid
from pico_fast.pixels import gather_pixels
from pico_fast.presets import preset
from pico_fast.selection.options import check_selection
from pico_fast.selection.synthesis import Synthesis, check_synthesis


def check_batch(
    embeddings: object,
    labels: object,
    logits: object,
    num_classes: int | None,
    names: tuple[str, str] = ("embeddings", "logits"),
) -> None:
    """Raise unless embeddings [B, D, H, W], labels [B, h, w] and logits belong together.

    `names` are what the caller calls embeddings and logits.
    """
    checks.tensor(names[0], embeddings, "[B, D, H, W]", "floating")
    checks.tensor("labels", labels, "[B, h, w]", "integer")
    checks.size("labels", labels, 0, embeddings.shape[0], f"images of {names[0]}")
    checks.same_device("labels", labels, names[0], embeddings)
    if embeddings.numel() and labels.numel() == 0:
        raise ValueError(f"labels: expected at least one pixel, got {checks.describe(labels)}")
    check_predictions(names[1], logits, num_classes, labels)


class PiCoLoss(nn.Module):
    """Pixel contrast across images: hard anchors of this batch against a bank of pixels and regions.

    Args:
        num_classes: C.
        embedding_dim: D, channels of the embeddings.
        temperature: divides inner products.
        base_temperature: if given, the loss is multiplied by temperature / base_temperature.
        sampling, positives, num_positives, num_negatives, hard_fraction: which keys an anchor is compared
            with; see `select_keys`.
        max_samples, max_views, min_pixels, easy: which pixels (at embedding resolution) are anchors; see
            `sample_anchors`.
        pixel_queue_size, region_queue_size, pixels_per_image, process_group, placement, max_images: the
            bank's; see `MemoryBank`. Without slots (both sizes 0) the anchors meet one another. "sharded"
            sends anchors to the other ranks; the bank may then be as large as all ranks' memory.
        bank_dtype: of the stored embeddings.
        synthesis: a `Synthesis`, or None for no extra negatives.
        ignore_index: label of pixels to leave out.
        seed: with `step` it decides every draw.
        impl: None picks by device; "reference" is the specification in plain PyTorch.

    Attributes:
        bank: the `MemoryBank`.
        step: [] int64 buffer, training steps so far.
        stats: device tensors of the last forward: "anchors" (slots in use), "hard_anchors" (share of
            them whose prediction is wrong), "positive_similarity" and "negative_similarity" (mean inner
            product with what the anchors are compared with), "pixel_fill" and "region_fill" (share of
            the bank's slots in use before the batch) and "refused" (vectors that the bank has not taken
            because they were not finite, this batch's among them). Reading one waits for the device;
            keeping them does not.

    `criterion(embeddings, labels, logits)` takes embeddings [B, D, H, W] (float32, bfloat16, float16 or
    float64, unit length along D), labels [B, h, w] of any integer dtype and logits [B, C, h', w'],
    integer predictions [B, h', w'] or None, and returns a scalar: float32, or float64 for float64
    embeddings. The anchors are compared with the bank as it was before the batch; in training the
    batch is then stored and `step` advances. An embedding that holds a nan or an infinity makes the loss
    nan where it is an anchor, but no gradient of another pixel, and the bank refuses it. The value has a
    floor far above 0: watch the similarities.

    Several ranks call it equally often, in eval as well, each with its own batch, an empty one if need be.
    The value is N times the sum over this rank's anchors divided by the number of all ranks' anchors
    that count, so that the mean over the N ranks, of values and of DDP's gradients, is that of one
    process with all anchors. Each rank draws up to max_samples anchors; `stats` are about its own. In
    batch, where there is no bank, a rank's anchors meet one another alone, and the mean is over all ranks
    as before. With placement "local" each rank is on its own in everything.

    Source: PiCo, TPAMI 2024; Wang et al., ICCV 2021.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int = 256,
        temperature: float = 0.1,
        base_temperature: float | None = None,
        sampling: str = "semi_hard",
        positives: str | None = None,
        num_positives: int = 1024,
        num_negatives: int = 2048,
        hard_fraction: float = 0.1,
        max_samples: int = 1024,
        max_views: int = 100,
        min_pixels: int = 1,
        pixel_queue_size: int = 10_000,
        region_queue_size: int = 1_000,
        pixels_per_image: int = 10,
        synthesis: Synthesis | None = None,
        ignore_index: int = 255,
        bank_dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        impl: str | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        placement: str = "replicated",
        max_images: int | None = None,
        easy: str = "correct",
    ) -> None:
        super().__init__()
        self.temperature = checks.number("temperature", temperature, above=0.0)
        self.scale = 1.0
        if base_temperature is not None:
            base_temperature = checks.number("base_temperature", base_temperature, above=0.0)
            self.scale = self.temperature / base_temperature
        selection = check_selection(sampling, positives, num_positives, num_negatives, hard_fraction)
        check_sizes(max_samples, max_views, min_pixels, easy)
        check_synthesis(synthesis)
        checks.floating_dtype("bank_dtype", bank_dtype)
        self.settings = Settings(selection, self.temperature, synthesis, checks.implementation(impl))
        self.sizes = (max_samples, max_views, min_pixels)
        self.easy = easy
        # the bank checks what is left
        self.bank = MemoryBank(
            num_classes,
            embedding_dim,
            pixel_queue_size,
            region_queue_size,
            pixels_per_image,
            bank_dtype,
            ignore_index,
            seed,
            impl=impl,
            process_group=process_group,
            placement=placement,
            max_images=max_images,
        )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.seed = seed
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.stats: dict[str, Tensor] = {}

    @classmethod
    def from_preset(cls, name: str, **options: object) -> "PiCoLoss":
        """The criterion for a data set: its classes, ignore label and the paper's queue sizes.

        Args:
            name: "cityscapes", "camvid", "pascal_context", "ade20k" or "coco_stuff"; see
                `pico_fast.presets`, which also tells whether label 0 is a class.
            options: any argument of PiCoLoss, those of the preset included.

        `python -m pico_fast.info` prints the memory each of them takes.
        """
        return cls(**{**preset(name).options(), **options})

    def forward(
        self,
        embeddings: Tensor,  # [B, D, H, W]
        labels: Tensor,  # [B, h, w] integer
        logits: Tensor | None = None,  # [B, C, h', w'] scores or [B, h', w'] predictions
    ) -> Tensor:
        """The loss of the batch, a scalar; see the class."""
        check_batch(embeddings, labels, logits, self.num_classes)
        bank = self.bank
        checks.size("embeddings", embeddings, 1, bank.embedding_dim, "embedding_dim")
        checks.same_device("embeddings", embeddings, "the bank", bank.storage)
        bank.check_ranks(labels.shape[0])
        ranks = bank.ranks

        height, width = embeddings.shape[2:]
        labels = labels_on_grid(labels, height, width, self.num_classes, self.ignore_index)
        predictions = predictions_on_grid(logits, height, width)

        common_seed = draws.step_seed(self.seed, self.step)
        # no two ranks draw alike
        seed = draws.step_seed(common_seed, ranks.rank) if ranks.size > 1 else common_seed
        sample = reference.sample_anchors if self.settings.is_reference else draw_anchors
        pixel, anchor_labels = sample(labels, predictions, *self.sizes, self.num_classes, seed, self.easy)
        anchors = gather_pixels(embeddings, pixel)

        # on its way between the ranks while the anchors are compared with the bank as it was
        write = bank.start_write(embeddings.detach(), labels) if self.training else None
        share = bank.share() if bank.slots else None
        first_row = ranks.rank * anchors.shape[0]
        pairs = (anchors, anchor_labels, None, None)
        rows = contrast_rows(*pairs, share, self.settings, common_seed, first_row)
        n_counted = rows.counted.sum()
        if ranks.size > 1:
            n_counted = ranks.sum(n_counted)
        loss = rows.loss.sum() / n_counted.clamp(min=1) * (self.scale * ranks.size)

        self._keep_stats(labels, predictions, pixel, rows)
        if self.training:
            write()
            self.step.add_(1)
        self.stats["refused"] = bank.refused.clone()
        return loss if embeddings.dtype == torch.float64 else loss.float()

    @torch.no_grad()
    def _keep_stats(
        self,
        labels: Tensor,  # [B, H, W] int64
        predictions: Tensor | None,  # [B, H, W] int64
        pixel: Tensor,  # [A] int64
        rows: ContrastRows,
    ) -> None:
        used = pixel >= 0
        n_used = used.sum()
        hard = torch.zeros_like(used)
        if predictions is not None and labels.numel():
            hard = (predictions != labels).flatten().gather(0, pixel.clamp(min=0)) & used
        n_counted = rows.counted.sum().clamp(min=1)
        bank = self.bank
        self.stats = {
            "anchors": n_used,
            "hard_anchors": hard.sum() / n_used.clamp(min=1),
            "positive_similarity": torch.where(rows.counted, rows.similar, 0.0).sum() / n_counted,
            "negative_similarity": torch.where(rows.counted, rows.away, 0.0).sum() / n_counted,
            "pixel_fill": bank.pixel_count.sum() / max(1, bank.pixel_queue_size * bank.num_classes),
            "region_fill": bank.region_count.sum() / max(1, bank.region_queue_size * bank.num_classes),
        }


class JointLoss(nn.Module):
    """Segmentation loss + weight x contrast: what a training loop calls.

    Args:
        criterion: `PiCoLoss` or `PixelContrastLoss`.
        weight: of the contrast.
        warmup_steps: training steps in which the contrast counts with weight 0 while the bank fills.
        segmentation_loss: a module of (logits [B, C, h, w], labels [B, h, w] int64) that returns a
            scalar; None is cross-entropy, the mean over pixels that are not left out, 0 without any.
            Pixels to leave out carry the criterion's ignore_index.

    `joint(logits, embeddings, labels)` brings logits to the labels' size bilinearly and returns a scalar.

    Source: Wang et al., ICCV 2021, equation 6; weight 0.1 and a warm-up as released.
    """

    def __init__(
        self,
        criterion: nn.Module,
        weight: float = 0.1,
        warmup_steps: int = 0,
        segmentation_loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(criterion, nn.Module) or not hasattr(criterion, "ignore_index"):
            raise TypeError(
                f"criterion: expected a PiCoLoss or a PixelContrastLoss, got {checks.describe(criterion)}"
            )
        if segmentation_loss is not None and not callable(segmentation_loss):
            raise TypeError(
                "segmentation_loss: expected a module of (logits, labels) or None, got"
                f" {checks.describe(segmentation_loss)}"
            )
        self.criterion = criterion
        self.weight = checks.number("weight", weight, minimum=0.0)
        self.warmup_steps = checks.integer("warmup_steps", warmup_steps, 0)
        self.segmentation_loss = segmentation_loss
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        logits: Tensor,  # [B, C, h', w']
        embeddings: Tensor,  # [B, D, H, W]
        labels: Tensor,  # [B, h, w] integer
    ) -> Tensor:
        """Both losses, a scalar; see the class."""
        checks.tensor("logits", logits, "[B, C, h, w]", "floating")
        # the drop-in's num_classes is only an upper bound, that of the whole method is exact
        is_exact = isinstance(self.criterion, PiCoLoss)
        check_batch(embeddings, labels, logits, self.criterion.num_classes if is_exact else None)
        ignore_index = self.criterion.ignore_index
        # checked before the criterion writes anything: its own limit may be wider than the logits'
        full = labels_on_grid(labels, *labels.shape[1:], logits.shape[1], ignore_index)
        contrast = self.criterion(embeddings, labels, logits)
        # a tensor, not a branch: the end of the warm-up recompiles nothing
        contrast = contrast * (self.step >= self.warmup_steps)
        if self.training:
            self.step.add_(1)
        full = torch.where(full < 0, ignore_index, full)
        if logits.shape[2:] != full.shape[1:] and logits.numel():
            logits = interpolate(logits, full.shape[1:], mode="bilinear", align_corners=False)
        if self.segmentation_loss is not None:
            segmentation = self.segmentation_loss(logits, full)
        else:
            wide = logits if logits.dtype == torch.float64 else logits.float()
            total = cross_entropy(wide, full, ignore_index=ignore_index, reduction="sum")
            segmentation = total / (full != ignore_index).sum().clamp(min=1)
        return segmentation + self.weight * contrast
