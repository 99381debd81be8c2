"""Small street scenes with ground truth, drawn from a seed.

Several classes share their colours and textures on purpose: a bus wears the colours of a facade
or of a car and has windows like both, a bush has the leaves of a tree. Only shape and
surroundings tell them apart. Signs are rare. The outline of every object is one ignored pixel
wide, as in PASCAL VOC.

    python examples/scenes.py FOLDER    writes images/{train,val} and labels/{train,val} there
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

CLASSES = ("sky", "ground", "building", "bus", "car", "tree", "bush", "sign")
SKY, GROUND, BUILDING, BUS, CAR, TREE, BUSH, SIGN = range(len(CLASSES))
IGNORE = 255

# facades, buses and cars draw from one palette, so that colour alone decides nothing
PAINTS = ((176, 82, 66), (198, 168, 122), (128, 136, 148), (92, 118, 156), (206, 198, 186))
LEAVES = ((62, 98, 48), (86, 116, 52), (48, 84, 58), (120, 118, 52))
SIGN_PLATES = ((188, 44, 44), (46, 88, 168), (206, 176, 48))


class _Canvas:
    """An image and its label map, painted together so that they cannot disagree."""

    def __init__(self, size: int, rng: np.random.Generator):
        self.size = size
        self.rng = rng
        self.image = Image.new("RGB", (size, size))
        self.labels = Image.new("L", (size, size), SKY)
        self._colour = ImageDraw.Draw(self.image)
        self._label = ImageDraw.Draw(self.labels)

    def rectangle(self, box, colour, label: int, radius: float = 0.0) -> None:
        box = [round(float(v)) for v in box]
        self._colour.rounded_rectangle(box, radius, fill=colour)
        self._label.rounded_rectangle(box, radius, fill=label)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour, label: int) -> None:
        box = (x - rx, y - ry, x + rx, y + ry)
        self._colour.ellipse(box, fill=colour)
        self._label.ellipse(box, fill=label)

    def paint(self, palette) -> tuple[int, int, int]:
        """A colour of the palette, a little off."""
        base = np.array(palette[self.rng.integers(len(palette))])
        return tuple(int(v) for v in np.clip(base + self.rng.normal(0, 12, 3), 0, 255))


def _shade(colour: tuple[int, ...], factor: float) -> tuple[int, ...]:
    return tuple(min(255, int(v * factor)) for v in colour)


def _windows(canvas: _Canvas, box, columns: int, rows: int, label: int) -> None:
    """A grid of dark panes; the same panes for facades, buses and cars."""
    left, top, right, bottom = box
    pane = _shade((96, 112, 128), canvas.rng.uniform(0.5, 1.3))
    width, height = (right - left) / columns, (bottom - top) / rows
    for row in range(rows):
        for column in range(columns):
            x, y = left + column * width, top + row * height
            canvas.rectangle(
                (x + 0.2 * width, y + 0.2 * height, x + 0.8 * width, y + 0.8 * height), pane, label
            )


def _building(canvas: _Canvas, left: float, width: float, horizon: float) -> None:
    top = horizon * canvas.rng.uniform(0.15, 0.7)
    box = (left, top, left + width, horizon + 2)
    canvas.rectangle(box, canvas.paint(PAINTS), BUILDING)
    rows = max(1, int((horizon - top) / canvas.rng.uniform(7, 11)))
    _windows(canvas, box, max(1, int(width / canvas.rng.uniform(6, 9))), rows, BUILDING)


def _vehicle(canvas: _Canvas, x: float, ground: float, scale: float, label: int) -> None:
    """A bus is one long box with a band of panes; a car a low box with a cabin on top."""
    rng = canvas.rng
    colour = canvas.paint(PAINTS)
    if label == BUS:
        width, height = scale * rng.uniform(28, 36), scale * rng.uniform(15, 19)
        box = (x - width / 2, ground - height, x + width / 2, ground - 2 * scale)
        canvas.rectangle(box, colour, label, radius=2 * scale)
        panes = (box[0] + 1, box[1] + 0.1 * height, box[2] - 1, box[1] + 0.6 * height)
        _windows(canvas, panes, int(rng.integers(4, 7)), 1, label)
    else:
        width, height = scale * rng.uniform(19, 25), scale * rng.uniform(10, 12)
        body = (x - width / 2, ground - 0.6 * height, x + width / 2, ground - 1.5 * scale)
        cabin = (x - 0.32 * width, ground - height, x + 0.28 * width, ground - 0.5 * height)
        canvas.rectangle(cabin, colour, label, radius=2 * scale)
        canvas.rectangle(body, colour, label, radius=1.5 * scale)
        _windows(canvas, (cabin[0], cabin[1], cabin[2], cabin[3] + 1), 2, 1, label)
    for side in (-0.32, 0.32):
        wheel = 2.1 * scale
        canvas.ellipse(x + side * width, ground - wheel, wheel, wheel, (34, 34, 38), label)


def _leaves(canvas: _Canvas, x: float, y: float, rx: float, ry: float, label: int) -> None:
    """A crown of overlapping blobs; the same for trees and bushes."""
    colour = canvas.paint(LEAVES)
    for _ in range(14):
        angle, reach = canvas.rng.uniform(0, 2 * np.pi), canvas.rng.uniform(0, 0.7)
        blob = _shade(colour, canvas.rng.uniform(0.75, 1.25))
        canvas.ellipse(
            x + reach * rx * np.cos(angle),
            y + reach * ry * np.sin(angle),
            0.5 * rx,
            0.5 * ry,
            blob,
            label,
        )


def _tree(canvas: _Canvas, x: float, ground: float, scale: float) -> None:
    height = scale * canvas.rng.uniform(26, 36)
    trunk = (x - 1.3 * scale, ground - 0.55 * height, x + 1.3 * scale, ground)
    canvas.rectangle(trunk, _shade((92, 70, 50), canvas.rng.uniform(0.7, 1.2)), TREE)
    _leaves(canvas, x, ground - 0.68 * height, scale * canvas.rng.uniform(9, 13), 0.4 * height, TREE)


def _bush(canvas: _Canvas, x: float, ground: float, scale: float) -> None:
    rx, ry = scale * canvas.rng.uniform(7, 13), scale * canvas.rng.uniform(5, 8)
    _leaves(canvas, x, ground - 0.8 * ry, rx, ry, BUSH)


def _sign(canvas: _Canvas, x: float, ground: float, scale: float) -> None:
    height, radius = scale * canvas.rng.uniform(17, 24), scale * canvas.rng.uniform(4, 6)
    canvas.rectangle((x - 1.4, ground - height, x + 1.4, ground), (110, 112, 116), SIGN)
    colour = canvas.paint(SIGN_PLATES)
    if canvas.rng.random() < 0.5:
        canvas.ellipse(x, ground - height, radius, radius, colour, SIGN)
    else:
        box = (x - radius, ground - height - radius, x + radius, ground - height + radius)
        canvas.rectangle(box, colour, SIGN)


def _backdrop(canvas: _Canvas, horizon: float) -> None:
    """Sky and ground, each with its own brightness gradient."""
    rng, size = canvas.rng, canvas.size
    day = rng.uniform(0, 1)
    top = np.array([110, 150, 205]) * day + np.array([178, 180, 184]) * (1 - day)
    ramp = np.linspace(0, 1, size)[:, None, None]
    rows = top * (1 - ramp) + np.array([222, 214, 204]) * ramp
    tone = np.array(_shade((116, 114, 112), rng.uniform(0.7, 1.25)))
    below = np.arange(size)[:, None, None] >= horizon
    rows = np.where(below, tone * (0.8 + 0.35 * ramp), rows)
    pixels = np.broadcast_to(rows, (size, size, 3)).clip(0, 255).astype(np.uint8)
    canvas.image.paste(Image.fromarray(np.ascontiguousarray(pixels)))
    canvas.labels.paste(GROUND, (0, int(np.ceil(horizon)), size, size))


def _photograph(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """The painted image [H, W, 3] uint8 as a cheap camera sees it: tint, blur, patches, noise."""
    size = image.size[0]
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.5)), dtype=np.float32)
    patches = rng.normal(0, 9, (12, 12)).astype(np.float32)
    patches = Image.fromarray(patches).resize((size, size), Image.Resampling.BICUBIC)
    pixels = pixels * rng.uniform(0.65, 1.15) * rng.uniform(0.92, 1.08, 3).astype(np.float32)
    pixels = pixels + np.asarray(patches)[..., None] + rng.normal(0, 8, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def _outline(labels: np.ndarray) -> np.ndarray:
    """Where a label [H, W] differs from its right or lower neighbour."""
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


def draw_scene(seed: int, index: int, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of a seed: image [size, size, 3] and labels [size, size], both uint8."""
    rng = np.random.default_rng((seed, index))
    canvas = _Canvas(size, rng)
    unit = size / 96
    horizon = size * rng.uniform(0.42, 0.6)
    _backdrop(canvas, horizon)
    x = rng.uniform(-20, 10) * unit
    while x < size:
        width = rng.uniform(16, 38) * unit
        if rng.random() < 0.7:
            _building(canvas, x, width, horizon)
        x += width + rng.uniform(0, 12) * unit

    kinds = rng.choice([BUS, CAR, TREE, BUSH], size=rng.integers(3, 7)).tolist()
    if rng.random() < 0.4:
        kinds.append(SIGN)
    # what stands nearer is lower in the image, larger, and painted over what is behind
    depths = np.sort(rng.uniform(0, 1, len(kinds)))
    for kind, depth in zip(rng.permutation(kinds), depths, strict=True):
        ground = horizon + (0.08 + 0.85 * depth) * (size - horizon)
        scale = unit * (0.65 + 0.65 * depth) * rng.uniform(0.85, 1.15)
        x = rng.uniform(0, size)
        if kind in (BUS, CAR):
            _vehicle(canvas, x, ground, scale, int(kind))
        else:
            {TREE: _tree, BUSH: _bush, SIGN: _sign}[int(kind)](canvas, x, ground, scale)

    labels = np.array(canvas.labels)
    labels[_outline(labels)] = IGNORE
    return _photograph(canvas.image, rng), labels


def draw_scenes(seed: int, count: int, size: int = 96, first: int = 0) -> tuple[Tensor, Tensor]:
    """Images [count, 3, size, size] float32 around 0 and labels [count, size, size] int64."""
    scenes = (draw_scene(seed, index, size) for index in range(first, first + count))
    images, labels = zip(*scenes, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels.float() / 127.5 - 1, torch.from_numpy(np.stack(labels)).long()


def write_folder(
    root: Path, seed: int = 0, train: int = 64, val: int = 32, size: int = 96, suffix: str = ".png"
) -> None:
    """Scenes in the layout that `train_segmentation.py --data folder` reads."""
    start = 0
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(start, start + count):
            image, labels = draw_scene(seed, index, size)
            Image.fromarray(image).save(root / "images" / split / f"{index:05d}{suffix}")
            Image.fromarray(labels).save(root / "labels" / split / f"{index:05d}.png")
        start += count


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write generated street scenes into a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=64)
    parser.add_argument("--val", type=int, default=32)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write_folder(options.folder, options.seed, options.train, options.val, options.size)
    print(f"{options.train} + {options.val} scenes, {len(CLASSES)} classes, in {options.folder}")


if __name__ == "__main__":
    main()
