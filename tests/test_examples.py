"""The examples: what they compute, that they run end to end, and that a resumed run is the same run."""

# ruff: noqa: E402, for the examples are scripts: their folder has to be found before they are

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pico_fast

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import camvid_report
import checkpoint
import demo
import metrics
import scenes
import segmentation_data
import train_segmentation

SCENES = 10
OPTIONS = (
    "--data folder --num-classes 8 --size 48 48 --width 16 --stem-stride 1 --batch-size 4 --threads 1"
    " --embedding-dim 16 --max-samples 64 --pixel-queue-size 20 --region-queue-size 8"
    " --num-positives 8 --num-negatives 16 --synthesis-count 4 --device cpu"
)
TRAIN = OPTIONS.split()


@pytest.fixture(autouse=True)
def threads():
    """The scripts set the number of threads; the next test finds it as it was."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    scenes.write_folder(root, seed=0, train=SCENES, val=3, size=48)
    return root


def camvid() -> Path:
    """CamVid's folder; skips where there is none."""
    places = [ROOT.parent / "shared" / "data" / "camvid", ROOT / "data" / "camvid"]
    if "PICO_FAST_CAMVID" in os.environ:
        places.insert(0, Path(os.environ["PICO_FAST_CAMVID"]))
    for place in places:
        if (place / "images" / "train").is_dir():
            return place
    pytest.skip("CamVid is not here: set PICO_FAST_CAMVID to its folder, or put it into data/camvid")


def same(a: object, b: object, where: str = "checkpoint") -> None:
    """Fail unless two checkpoints agree bit for bit, times aside."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds"}:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def test_iou_by_hand():
    labels = torch.tensor([[0, 0, 1, 1], [1, 255, -1, 0]])
    predictions = torch.tensor([[0, 1, 1, 1], [0, 2, 2, 0]])
    confusion = metrics.confusion_matrix(predictions, labels, num_classes=3)
    assert confusion.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    iou = metrics.class_iou(confusion)
    assert iou[:2].tolist() == [0.5, 0.5] and torch.isnan(iou[2])
    assert metrics.mean_iou(confusion) == 0.5
    with pytest.raises(ValueError, match="expected classes 0 to 2, got 3"):
        metrics.confusion_matrix(predictions, labels.clamp(min=3), num_classes=3)


def test_scenes_depend_on_seed_and_index_alone():
    images, labels = scenes.draw_scenes(seed=3, count=40)
    again, labels_again = scenes.draw_scenes(seed=3, count=5, first=20)
    assert torch.equal(images[20:25], again) and torch.equal(labels[20:25], labels_again)
    assert not torch.equal(images[:5], scenes.draw_scenes(seed=4, count=5)[0])
    assert labels.unique().tolist() == [*range(len(scenes.CLASSES)), scenes.IGNORE]
    assert images.abs().max() <= 1


def test_stream_draws_each_image_once_an_epoch_in_any_order(folder):
    train = segmentation_data.Folder(folder, "train")
    stream = segmentation_data.TrainingStream(train, (48, 48), seed=1)
    for epoch in range(3):
        draws = range(epoch * SCENES, (epoch + 1) * SCENES)
        assert sorted(map(stream.image_of, draws)) == list(range(SCENES))
    first = stream[7]
    stream[3]
    assert all(torch.equal(a, b) for a, b in zip(first, stream[7], strict=True))


def test_augmented_labels_stay_on_their_pixels(tmp_path):
    rng = np.random.default_rng(0)
    # brightness tells the class, in blocks that survive interpolation
    blocks = np.kron(rng.integers(0, 8, (4, 6)), np.ones((16, 16))).astype(np.uint8)
    for kind, pixels in (("images", np.stack([blocks * 30] * 3, 2)), ("labels", blocks)):
        (tmp_path / kind / "train").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / kind / "train" / "a.png")
    still = segmentation_data.Augmentation(colour=0.0)
    stream = segmentation_data.TrainingStream(
        segmentation_data.Folder(tmp_path, "train"), (64, 96), seed=0, augmentation=still
    )
    for draw in range(20):
        pixels, labels = stream[draw]
        grey = (pixels * segmentation_data.SPREAD + segmentation_data.MEAN)[0] * 255 / 30
        inside = labels != 255
        assert pixels.shape == (3, 64, 96) and inside.any()
        assert (grey[inside].round() == labels[inside]).float().mean() > 0.8
        assert (pixels[:, ~inside] == 0).all()


def test_demo_end_to_end(tmp_path):
    length = "--steps 6 --train-scenes 8 --test-scenes 6"
    run = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py", *length.split(), "--output", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    for word in (*scenes.CLASSES, "mean", "change", "regions", "The contrast takes"):
        assert word in run.stdout
    assert Image.open(tmp_path / "demo.png").size[0] > 800


def short_demo(tmp_path: Path) -> str:
    """The message with which a demo of two steps ends."""
    with pytest.raises(SystemExit) as stop:
        demo.main(f"--steps 2 --train-scenes 4 --test-scenes 2 --output {tmp_path}".split())
    return str(stop.value.code)


def test_demo_refuses_nan(tmp_path, monkeypatch):
    original = pico_fast.PiCoLoss.forward
    monkeypatch.setattr(pico_fast.PiCoLoss, "forward", lambda *args: original(*args) * float("nan"))
    assert "the loss is nan" in short_demo(tmp_path)


def test_demo_refuses_an_empty_bank(tmp_path, monkeypatch):
    monkeypatch.setattr(pico_fast.MemoryBank, "start_write", lambda *args: lambda: None)
    assert "the bank is still empty" in short_demo(tmp_path)


@pytest.mark.parametrize("loss", ["pico", "ce"])
def test_resumed_equals_uninterrupted(folder, tmp_path, monkeypatch, loss):
    def run(file: Path, *more: str) -> dict:
        options = [*TRAIN, "--root", str(folder), "--loss", loss, "--checkpoint", str(file), *more]
        # evaluations fall between checkpoints, so that a mean loss has to survive the cut
        length = "--steps 7 --save-every 3 --eval-every 4 --warmup-steps 2"
        options += length.split()
        return train_segmentation.train(train_segmentation.parse(options))

    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    result = run(whole)

    save = train_segmentation.save_checkpoint

    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_segmentation, "save_checkpoint", save_and_die)
        run(cut)
    assert torch.load(cut, weights_only=True)["step"] == 3
    resumed = run(cut, "--resume")

    states = [torch.load(file, weights_only=True) for file in (whole, cut)]
    same(*states)
    same(result, resumed)
    assert states[0]["step"] == 7
    if loss == "pico":
        joint = states[0]["parts"]["joint"]
        assert joint["criterion.step"] == 7
        assert joint["criterion.bank.pixel_count"].sum() > 0
    with pytest.raises(SystemExit, match="seed was 0, is 5"):
        run(cut, "--resume", "--seed", "5")


def test_a_save_that_dies_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    file, cpu = tmp_path / "run.pt", torch.device("cpu")
    layer = torch.nn.Linear(2, 2)
    checkpoint.save_checkpoint(file, {"layer": layer}, 1, {}, cpu)

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", die)
        checkpoint.save_checkpoint(file, {"layer": layer}, 2, {}, cpu)
    assert checkpoint.load_checkpoint(file, {"layer": layer}, {}, cpu) == 1
    with pytest.raises(SystemExit, match="no checkpoint at"):
        checkpoint.load_checkpoint(tmp_path / "none.pt", {}, {}, cpu)


@pytest.mark.parametrize(
    "more",
    [
        "--loss ce --amp",
        "--sampling all --no-synthesis --no-hard-anchors --amp",
        "--sampling hardest --workers 2",
        "--sampling random --epochs 1",
        "--hard-fraction 0.5",
    ],
)
def test_options_train(folder, tmp_path, more):
    output = tmp_path / "result.json"
    length = [] if "--epochs" in more else ["--steps", "2"]
    train_segmentation.main(
        [*TRAIN, "--root", str(folder), "--output", str(output), *length, *more.split()]
    )
    text = output.read_text()
    assert '"miou"' in text and str(folder) not in text


def test_a_sequence_is_held_out(folder, monkeypatch):
    names = sorted(path.name for path in (folder / "images" / "train").iterdir())
    prefix = "00003"
    held_out = [name for name in names if name.startswith(prefix)]
    assert 0 < len(held_out) < len(names)
    trained_on = set()
    load = segmentation_data.Folder.load

    def watched(self, index):
        trained_on.add((self.images[index].parent.name, self.images[index].name))
        return load(self, index)

    stream = segmentation_data.TrainingStream.__getitem__

    def drawn(self, draw):
        with monkeypatch.context() as patch:
            patch.setattr(segmentation_data.Folder, "load", watched)
            return stream(self, draw)

    monkeypatch.setattr(segmentation_data.TrainingStream, "__getitem__", drawn)
    options = [*TRAIN, "--root", str(folder), "--epochs", "2", "--loss", "ce", "--hold-out", prefix]
    result = train_segmentation.train(train_segmentation.parse(options))
    want = {("train", name) for name in names if name not in held_out}
    assert trained_on == want
    assert result["train_images"] == len(want)
    assert result["held_out"]["images"] == len(held_out)
    assert 0 < result["held_out"]["miou"] < 1
    with pytest.raises(FileNotFoundError, match="whose names begin with x"):
        segmentation_data.Folder(folder, "train", only="x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data folder --root x", "needs --num-classes"),
        ("--data camvid --root x --resume", "needs --checkpoint"),
        ("--data camvid --root x --amp fp16 --device cpu", "needs a CUDA device"),
    ],
)
def test_impossible_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train_segmentation.parse(arguments.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_missing_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="images/train: expected a folder"):
        segmentation_data.Folder(tmp_path, "train")
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "images" / "train" / "a.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"1 images without labels.*a\.png"):
        segmentation_data.Folder(tmp_path, "train")


def test_camvid_reduced():
    options = (
        "--data camvid --size 48 64 --width 16 --steps 3 --batch-size 4 --threads 1 --device cpu"
        " --embedding-dim 16 --max-samples 128 --pixel-queue-size 50 --region-queue-size 20"
        " --num-positives 16 --num-negatives 64 --synthesis-count 8"
    )
    result = train_segmentation.train(train_segmentation.parse([*options.split(), "--root", str(camvid())]))
    assert list(result["iou"]) == list(segmentation_data.CAMVID_CLASSES)
    assert 0 < result["miou"] < 1
    last = result["curve"][-1]
    assert np.isfinite(last["loss"]) and last["pixel_fill"] > 0 and last["region_fill"] > 0


def test_camvid_page_says_what_its_results_say(tmp_path):
    arms = camvid_report.read_results(camvid_report.DOCS / "camvid")
    camvid_report.write_report(arms, tmp_path / "camvid.md")
    committed = (camvid_report.DOCS / "camvid.md").read_text()
    assert (tmp_path / "camvid.md").read_text() == committed
