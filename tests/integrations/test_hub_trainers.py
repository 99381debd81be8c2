"""The trainers of docs/models.md but for mmsegmentation's, run as printed."""

import pytest
import torch
import trainers
from safetensors.torch import load_file

# what each prints of its losses
PRINTS = {
    "plain_loop": r"loss ([\d.]+), similarity ([\d.-]+), to others ([\d.-]+)",
    "hf_trainer": r"'loss': '([\d.]+)'.*'positive_similarity': '([\d.-]+)',"
    r" 'negative_similarity': '([\d.-]+)'",
    "lightning_module": r"loss=([\d.]+), positive_similarity=([\d.-]+),"
    r" negative_similarity=([\d.-]+)",
}
COMMANDS = [command for command in trainers.COMMANDS if "mmseg" not in command]


def test_every_command_has_a_test():
    names = {command.split("/")[1].split(".py")[0] for command in COMMANDS}
    assert names == set(PRINTS) and len(COMMANDS) == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_page(command, tmp_path):
    printed = trainers.run(command, tmp_path)
    name = command.split("/")[1].split(".py")[0]
    trainers.check(printed, PRINTS[name])
    runs = tmp_path / "runs"
    if name == "hf_trainer":
        (checkpoint,) = runs.glob("hf_trainer/checkpoint-*")
        assert any("pico_fast_tap" in key for key in load_file(checkpoint / "model.safetensors"))
        bank = torch.load(checkpoint / "pico.pt", weights_only=True)
        assert bank["criterion.bank.pixel_count"].min() > 0
        published = load_file(runs / "hf_trainer" / "final" / "model.safetensors")
        assert published and not any("pico_fast_tap" in key for key in published)
    if name == "lightning_module":
        (checkpoint,) = runs.glob("lightning/**/*.ckpt")
        state = torch.load(checkpoint, weights_only=False)["state_dict"]
        heads = [key for key in state if key.endswith("head.0.weight")]
        assert heads == ["model.pico_fast_tap.head.0.weight"]
        assert state["joint.criterion.bank.pixel_count"].min() > 0
