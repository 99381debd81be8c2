"""Data sets that people train on: their classes, labels to leave out, and the paper's memory for them."""

from dataclasses import dataclass

from pico_fast import checks


@dataclass(frozen=True)
class Preset:
    """A data set as a criterion needs to know it.

    Attributes:
        num_classes: C.
        ignore_index: label of pixels to leave out.
        zero_is_class: whether label 0 of the published annotation is a class; where it is not, labels
            are lowered by 1 when they are loaded and 0 becomes ignore_index ("reduce_zero_label").
        train_images: size of the usual training set.
        pixel_queue_size, region_queue_size: slots of a class.
        source: where the numbers are from.
    """

    num_classes: int
    ignore_index: int
    zero_is_class: bool
    train_images: int
    pixel_queue_size: int
    region_queue_size: int
    source: str

    def options(self) -> dict[str, int]:
        """What of it a criterion takes."""
        names = ("num_classes", "ignore_index", "pixel_queue_size", "region_queue_size")
        return {name: getattr(self, name) for name in names}

    def memory(self, embedding_dim: int = 256, bytes_of_a_value: int = 2) -> int:
        """Bytes of the bank."""
        slots = self.num_classes * (self.pixel_queue_size + self.region_queue_size)
        return slots * embedding_dim * bytes_of_a_value


# PiCo, TPAMI 2024: ten pixels and one region of each class and training image; 10,000 pixels for the
# large vocabularies, where a region queue of a tenth of that is our choice
PRESETS = {
    "cityscapes": Preset(19, 255, True, 2_975, 29_750, 2_975, "Cordts et al., CVPR 2016: train ids"),
    "camvid": Preset(11, 255, True, 367, 3_670, 367, "Brostow et al., PRL 2009; as in SegNet"),
    "pascal_context": Preset(
        59, 255, False, 4_998, 10_000, 1_000, "Mottaghi et al., CVPR 2014: 0 is background"
    ),
    "ade20k": Preset(150, 255, False, 20_210, 10_000, 1_000, "Zhou et al., CVPR 2017: 0 is other"),
    "coco_stuff": Preset(171, 255, True, 118_287, 10_000, 1_000, "Caesar et al., CVPR 2018: no gaps"),
}


def preset(name: object) -> Preset:
    """The preset of this name.

    Raises:
        TypeError, ValueError: no string, or none of the names.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected one of {tuple(PRESETS)}, got {checks.describe(name)}")
    checks.choice("name", name, PRESETS)
    return PRESETS[name]
