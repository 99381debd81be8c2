"""Checkpoints that a run continues from as if it had never stopped."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch


def _state(parts: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """All that changes while a run goes on, but the step."""
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    return {"parts": {name: part.state_dict() for name, part in parts.items()}, "random": random}


def _restore(state: dict[str, Any], parts: dict[str, Any], device: torch.device) -> None:
    if state["parts"].keys() != parts.keys():
        raise ValueError(f"expected the parts {sorted(parts)}, got {sorted(state['parts'])}")
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    torch.set_rng_state(state["random"]["cpu"])
    if device.type == "cuda" and "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"], device)


def save_checkpoint(
    path: Path, parts: dict[str, Any], step: int, settings: dict[str, Any], device: torch.device
) -> None:
    """Write `parts` (anything with a state_dict), step and random state; never half a file.

    Whatever stops it leaves the earlier checkpoint as it was. When it returns the new one is on the disk.
    """
    state = {**_state(parts, device), "step": step, "settings": settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    # always the same name: what a killed process has left is overwritten
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            # the rename must not reach the disk before the contents do
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)  # a full disk needs the room
        if isinstance(error, RuntimeError) and error.__context__:
            # torch.save hides what stopped its writing behind an error about positions
            raise error.__context__ from None
        raise
    if os.name == "posix":
        # nor is the rename on the disk before the folder is; Windows opens no folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, whole; nothing that it holds is run."""
    if not path.is_file():
        raise SystemExit(f"--resume: no checkpoint at {path}")
    try:
        # torch.save writes checksums, torch.load does not look at them
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} has another checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"parts", "random", "step", "settings"} - state.keys()
        if missing:
            raise ValueError(f"it lacks {sorted(missing)}")
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SystemExit(
            f"--resume: {path} is damaged or no checkpoint of this script ({why}); put a copy in its"
            " place, or start anew without --resume"
        ) from error
    return state


def load_checkpoint(
    path: Path, parts: dict[str, Any], settings: dict[str, Any], device: torch.device
) -> int:
    """Restore `parts` and the random state; the number of steps already done.

    A file that cannot be read or does not fit ends the script, with everything as it was.
    """
    state = _read(path)
    written = state["settings"]
    changed = [
        f"{name} was {written.get(name)}, is {settings.get(name)}"
        for name in sorted(written.keys() | settings.keys())
        if written.get(name) != settings.get(name)
    ]
    if changed:
        raise SystemExit(f"--resume: {path} comes from other settings: {'; '.join(changed)}")
    # no part can tell beforehand whether it will take a state; a copy that takes no device memory
    before = io.BytesIO()
    torch.save(_state(parts, device), before)
    try:
        _restore(state, parts, device)
    except Exception as error:
        before.seek(0)
        _restore(torch.load(before, weights_only=True, map_location="cpu"), parts, device)
        raise SystemExit(f"--resume: {path} does not fit, nothing was loaded: {error}") from error
    return state["step"]
