"""Pictures from a checkpoint: network, schedule, prediction and facts of the data come from it, so nothing contradicts it."""

import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion_cli import checkpoint, drawing, storage
from diffusion_cli.assembly import Facts, denoiser_of
from diffusion_cli.build import build
from diffusion_cli.checkpoint import Checkpoint, Damaged
from diffusion_cli.data.decoding import Unreadable, decode
from diffusion_cli.data.pixels import to_float, to_uint8
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.devices import Compute, choose
from diffusion_cli.errors import ConfigError, DataError, StorageError
from diffusion_cli.objectives.denoising import columns_for, trajectory, walk
from diffusion_cli.randomness import Source
from diffusion_cli.runs import say
from diffusion_cli.samplers import Sampler, State, Tail
from diffusion_cli.settings import Sample
from diffusion_cli.signatures import did_you_mean

FRAMES = 40  # of an animation at most


def sample(settings: Sample, sampler_node: Mapping[str, Any]) -> Path:
    """Writes the pictures that the settings ask for and returns their folder. Raises UserError."""
    began = time.perf_counter()
    compute = choose(settings.device, settings.precision, settings.compile, say)
    found = find(Path(settings.ckpt))
    node, facts = found.config["config"], found.config["facts"]
    lacking = [*({"schedule", "prediction", "model", "sampler"} - node.keys()), *(Facts.__required_keys__ - facts.keys())]
    if lacking:
        raise StorageError(f"{found.folder} is of another program: its config.json lacks {', '.join(sorted(lacking))}")
    sampler_node = _sampler_node(node, sampler_node)
    sampler = build(sampler_node, Sampler, "sampler", trust=settings.trust)
    denoiser = load_denoiser(found, settings.weights, settings.trust).to(compute.device)
    if compute.device.type == "cpu":
        denoiser.to(memory_format=torch.channels_last)  # measured 1.1 to 1.3 times faster without gradients
    if compute.compile:
        denoiser.network.compile()
    classes = _classes(settings.label, facts)
    init = None
    if settings.init is not None:
        init = _initial(Path(settings.init), facts)
        sampler = replace(sampler, grid=Tail(sampler.grid, settings.strength))
    asked = {
        "checkpoint": found.digest,
        "step": found.step,
        "seed": settings.seed,
        "sampler": sampler_node,
        "weights": settings.weights,
        "label": settings.label,
        "init": None if init is None else hashlib.sha256(init.numpy().tobytes()).hexdigest()[:16],
        "strength": None if init is None else settings.strength,
        "format": settings.format,
    }
    folder = _folder(settings, found, asked)
    storage.make_folder(folder)
    say(f"{found.folder}: {settings.weights} weights, {settings.n} pictures in {sampler.steps} steps, {compute}")
    shown: list[Tensor] = []
    arrays: list[Tensor] = []
    with torch.inference_mode(), compute.precision():
        for ids, images, states in _batches(denoiser, sampler, settings, classes, init, compute):
            shown.append(images[: max(0, 256 - sum(map(len, shown)))])
            if settings.format == "npz":
                arrays.append(images)
            else:
                for i, image in zip(ids.tolist(), images, strict=True):
                    facts_of_one = {**asked, "index": i, "label": _label_of(i, classes)}
                    storage.write(folder / f"{i:06d}.png", drawing.png(drawing.image_of(image), facts_of_one))
            if states and ids[0] == 0:
                _draw_trajectory(folder, states)
    if settings.format == "npz":
        _write_npz(folder / "samples.npz", torch.cat(arrays), classes, settings.n)
    columns = None if classes is None else columns_for(torch.tensor(classes))
    metadata = {**asked, "n": settings.n, "batch": settings.batch, "ckpt": str(found.folder), "device": str(compute)}
    storage.write(folder / "metadata.json", (json.dumps(metadata, indent=1) + "\n").encode())
    storage.write(folder / "grid.png", drawing.png(drawing.grid(torch.cat(shown), columns), metadata))
    seconds = time.perf_counter() - began
    say(f"{settings.n} pictures in {seconds:.1f} s: {folder}; look at {folder / 'grid.png'}")
    return folder


def find(path: Path) -> Checkpoint:
    """The checkpoint at a path: a run's newest good one, or that very folder. Raises StorageError with the way out."""
    path = path.expanduser()
    if (path / "manifest.json").exists() or path.name.startswith("step_"):
        try:
            return checkpoint.load(path)
        except Damaged as error:
            raise StorageError(f"ckpt={path} is damaged or incomplete: {error}") from None
    parent = path if path.name == "checkpoints" else path / "checkpoints"
    for candidate in checkpoint.good(parent):
        if isinstance(candidate, Checkpoint):
            return candidate
        say(f"passed over a damaged checkpoint: {candidate}")
    if not path.exists():
        beside = sorted(p.parent.as_posix() for p in path.parent.glob("*/checkpoints")) if path.parent.is_dir() else []
        raise ConfigError(f"ckpt={path} does not exist: {did_you_mean(str(path), beside) if beside else 'train it first'}")
    raise ConfigError(
        f"ckpt={path} holds no checkpoint: give a run (outputs/<name>) or one of its checkpoints/step_... folders"
    )


def load_denoiser(found: Checkpoint, weights: str, trust: tuple[str, ...] = ()) -> Denoiser:
    """The trained denoiser in evaluation mode. weights: ema or raw. Raises StorageError."""
    facts: Facts = found.config["facts"]
    denoiser = denoiser_of(found.config["config"], facts, trust)
    name = {"ema": "average", "raw": "weights"}[weights]
    try:
        tensors = found.tensors(name)
        own = {key.removeprefix("denoiser."): value for key, value in tensors.items() if key.startswith("denoiser.")}
        denoiser.load_state_dict(own)
    except (Damaged, RuntimeError) as error:
        raise StorageError(f"{found.folder} cannot be used: {str(error).splitlines()[-1].strip()}") from None
    return denoiser.eval().requires_grad_(False)


def _sampler_node(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler asked for, or the checkpoint's own with other steps."""
    node = dict(wanted) if "_target_" in wanted else {**config["sampler"]}
    if wanted.get("steps") is not None:
        node["steps"] = wanted["steps"]
    return node


def _classes(label: str | int | None, facts: Facts) -> list[int] | None:
    """Labels that the pictures take in turn; None for a network that is not told."""
    names = facts["classes"]
    if not facts["taught"]:
        if label is not None:
            raise ConfigError(f"label={label}: this network was trained without labels; train one with dataset.labels=true")
        return None
    if label is None:
        return facts["taught"]
    number = names.index(str(label)) if str(label) in names else label
    if number in facts["taught"]:
        return [int(number)]
    raise ConfigError(f"label={label}: {did_you_mean(str(label), [names[k] for k in facts['taught']])}")


def _label_of(i: int, classes: list[int] | None) -> int | None:
    return None if classes is None else classes[i % len(classes)]


def _folder(settings: Sample, found: Checkpoint, asked: Mapping[str, Any]) -> Path:
    """Where the pictures go: never over those of another question."""
    if settings.out is not None:
        folder = Path(settings.out)
    else:
        run = found.folder.parent.parent if found.folder.parent.name == "checkpoints" else found.folder
        sampler = asked["sampler"]
        words = [f"step_{found.step:08d}", sampler["_target_"].rpartition(".")[2].lower(), f"{sampler['steps']}"]
        words += [f"seed_{settings.seed}", *([] if settings.label is None else [f"label_{settings.label}"])]
        words += [] if settings.init is None else [f"from_{Path(settings.init).stem}_{settings.strength:g}"]
        words += ["raw"] if settings.weights == "raw" else []
        folder = run / "generated" / "-".join(words)
    try:
        before = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if folder.is_dir() and any(folder.glob("*.png")) and settings.out is not None:
            raise ConfigError(f"out={folder} holds pictures already: choose another folder") from None
        return folder
    except (OSError, ValueError):
        raise DataError(f"{folder / 'metadata.json'} cannot be read: choose another out=") from None
    if any(before.get(key) != value for key, value in asked.items()):
        if settings.out is not None:
            raise ConfigError(
                f"out={folder} holds the pictures of another question (its metadata.json says which): choose another folder"
            )
        for k in range(2, 1000):
            other = folder.with_name(f"{folder.name}-{k}")
            if not other.exists():
                return other
    return folder


def _initial(path: Path, facts: Facts) -> Tensor:
    """float32 [C, H, W]: the middle of the picture, in the size and channels of the network. Raises DataError."""
    try:
        encoded = path.expanduser().read_bytes()
        return to_float(torch.tensor(decode(encoded, size=facts["image_size"], channels=facts["channels"], resize="crop")))
    except (OSError, Unreadable) as error:
        raise DataError(f"init={path} cannot be read as a picture: {error}") from None


def _batches(
    denoiser: Denoiser, sampler: Sampler, settings: Sample, classes: list[int] | None, init: Tensor | None, compute: Compute
) -> Iterator[tuple[Tensor, Tensor, list[State]]]:
    """(ids [B], uint8 [B, C, H, W], states of the walk if a trajectory is wanted) until n pictures are made."""
    places = len(sampler.grid.times(sampler.steps, denoiser.schedule))
    moves = -(-settings.n // settings.batch) * (places - 1)
    with tqdm(total=moves, unit="step", disable=None, leave=False) as bar:
        for first in range(0, settings.n, settings.batch):
            ids = torch.arange(first, min(first + settings.batch, settings.n))
            labels = None if classes is None else torch.tensor([classes[i % len(classes)] for i in ids.tolist()])
            kept: list[State] = []
            wanted = set(drawing.evenly(FRAMES, places)) if settings.trajectory and first == 0 else set()
            for state in walk(denoiser, sampler, Source(settings.seed, ids.to(compute.device)), labels, init):
                bar.update(state.step > 0)
                if state.step in wanted:
                    kept.append(State(state.step, state.t, state.x[:16].clone(), state.x0[:16].clone()))
            yield ids, to_uint8(state.x).cpu(), kept


def _draw_trajectory(folder: Path, states: list[State]) -> None:
    """trajectory.png: x_t above the foreseen x0 at up to nine steps; trajectory.gif: both side by side, every step."""
    few = [states[i] for i in drawing.evenly(9, len(states))]
    storage.write(folder / "trajectory.png", drawing.png(trajectory(few)))
    frames = []
    for state in states:
        spread = state.x.flatten(1).std(1).clamp(min=1)[:, None, None, None]
        left, right = drawing.grid(to_uint8(state.x / spread)), drawing.grid(to_uint8(state.x0))
        sheet = Image.new("RGB", (left.width + right.width + 16, left.height), (255, 255, 255))
        sheet.paste(left.convert("RGB"), (0, 0))
        sheet.paste(right.convert("RGB"), (left.width + 16, 0))
        frames.append(sheet.convert("P", palette=Image.Palette.ADAPTIVE))
    storage.write(folder / "trajectory.gif", drawing.gif(frames))


def _write_npz(path: Path, images: Tensor, classes: list[int] | None, n: int) -> None:
    """images uint8 [N, H, W, C], and labels int64 [N] where there are any."""
    arrays = {"images": images.permute(0, 2, 3, 1).numpy()}
    if classes is not None:
        arrays["labels"] = np.array([classes[i % len(classes)] for i in range(n)], dtype=np.int64)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    storage.write(path, file.getvalue())
