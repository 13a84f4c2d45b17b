"""The checkpoint that a path means, and the trained denoiser in it."""

from pathlib import Path

from diffusion_cli import checkpoint
from diffusion_cli.assembly import Facts, denoiser_of
from diffusion_cli.checkpoint import Checkpoint, Damaged
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.runs import say
from diffusion_cli.signatures import did_you_mean


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
