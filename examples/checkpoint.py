"""Checkpoints that a run continues from as if it had never stopped."""

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(
    path: Path, parts: dict[str, Any], step: int, settings: dict[str, Any], device: torch.device
) -> None:
    """Write `parts` (anything with a state_dict), step and random state; never half a file."""
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    state = {
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "step": step,
        "settings": settings,
        "random": random,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        # the rename must not reach the disk before the contents do
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(
    path: Path, parts: dict[str, Any], settings: dict[str, Any], device: torch.device
) -> int:
    """Restore `parts` and the random state; the number of steps already done."""
    if not path.is_file():
        raise SystemExit(f"--resume: no checkpoint at {path}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    written = state["settings"]
    changed = [
        f"{name} was {written.get(name)}, is {settings.get(name)}"
        for name in sorted(written.keys() | settings.keys())
        if written.get(name) != settings.get(name)
    ]
    if changed:
        raise SystemExit(f"--resume: {path} comes from other settings: {'; '.join(changed)}")
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    torch.set_rng_state(state["random"]["cpu"])
    if device.type == "cuda" and "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"], device)
    return state["step"]
