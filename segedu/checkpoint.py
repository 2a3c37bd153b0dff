"""Checkpoints: one .safetensors file with weights, optimizer state and the facts of the run. Never a pickle."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from segedu.recipes import Recipe


def save_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, facts: dict) -> None:
    """Write beside, then rename: a kill or a full disk leaves the old checkpoint whole. Raises OSError."""
    tensors = {f"model.{key}": value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{i}.{key}": value.cpu().contiguous() for key, value in state.items() if value is not None
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata={"segedu": json.dumps(facts)})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        kept = f"the last good one, {path}, is kept" if path.exists() else "there is no earlier one"
        raise OSError(
            f"cannot write the checkpoint of step {len(facts['loss'])} to {path}: {error}; {kept}. "
            "Free some space and run the same call again"
        ) from error


def resume(path: Path, model: nn.Module, optimizer: Optimizer, wanted: dict) -> dict:
    """Put model and optimizer where the checkpoint left them; return its facts.

    Raises ValueError if it differs in a fact of `wanted`: it belongs to another run.
    """
    facts, tensors = read_checkpoint(path)
    facts["recipe"] = asdict(Recipe(**facts["recipe"]))  # a field that a newer version added has its default
    facts, wanted = json.loads(json.dumps([facts, wanted]))
    other = [f"{key}: {facts.get(key)} there, {wanted[key]} here" for key in wanted if facts.get(key) != wanted[key]]
    if other:
        raise ValueError(f"{path} belongs to another run ({'; '.join(other)}); choose another path or delete the file")
    load_checkpoint(path, model)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".", 2)
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return facts


def load_checkpoint(path: str | Path, model: nn.Module) -> dict:
    """Put the weights of a checkpoint into `model`; return what else it holds (about, recipe, seed, loss, ...)."""
    facts, tensors = read_checkpoint(path)
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} holds another model's weights: {error}") from None
    return facts


def read_checkpoint(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Facts and tensors of a checkpoint. Raises FileNotFoundError, or ValueError where it is not one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; `segedu train` writes one")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["segedu"])
            return facts, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of segedu or is broken ({error}); delete it to start anew"
        ) from None
