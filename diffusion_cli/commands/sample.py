"""diffusion-sample: pictures from a checkpoint."""

import re

from omegaconf import DictConfig

from diffusion_cli import cli, config

ABOUT = """diffusion-sample makes pictures with a trained model. All it needs is the run: ckpt=outputs/<name>.
It writes single pictures or large files, a grid and a metadata file; picture i of a seed is the same at any n and batch.
The same command makes what is missing; torchrun --nproc-per-node 8 --no-python diffusion-sample ... shares it out to 8 GPUs."""

GROUPS = ("sampler", "guidance", "edit")

EXAMPLES = (
    ("diffusion-sample ckpt=outputs/digits n=64", "single pictures and a grid"),
    ("diffusion-sample ckpt=outputs/digits sampler=dpmpp_2m sampler.steps=10", "another sampler, fewer steps"),
    ("diffusion-sample ckpt=outputs/digits trajectory=true n=16", "also a strip and a GIF from noise to picture"),
    ("diffusion-sample ckpt=outputs/digits/checkpoints/step_00002400 weights=raw", "that checkpoint, weights as trained"),
    ("diffusion-sample ckpt=outputs/cifar label=horse seed=7 out=horses", "one class, to a folder of your choice"),
    ("diffusion-sample ckpt=outputs/digits guidance=2 label=all n=100", "guided by labels, a row for each class"),
    ('diffusion-sample ckpt=outputs/text prompt="red apple" negative="blue" guidance=5', "a text, and what is not wanted"),
    ("diffusion-sample ckpt=outputs/digits snapshots=[0,10,40] nearest=5", "a walk in detail; the nearest training pictures"),
    ("diffusion-sample ckpt=hf://google/ddpm-cifar10-32 sampler=dpmpp_2m", "a pipeline of diffusers: the hub, or a folder"),
    ("diffusion-sample ckpt=outputs/digits n=50000 batch=1000 format=parquet", "many; the same command goes on after a stop"),
)


def main() -> None:
    page = lambda: cli.help_page("diffusion-sample", "sample", ABOUT, GROUPS, EXAMPLES)  # noqa: E731
    cli.run("diffusion-sample", "sample", task, page, lambda argv: with_texts(with_scale(argv)))


def with_scale(argv: list[str]) -> list[str]:
    """guidance=2 is short for guidance=cfg guidance.scale=2, and guidance=1,2 for a sweep over scales."""
    found = [re.fullmatch(r"guidance=(\d+\.?\d*(?:,\d+\.?\d*)*)", word) for word in argv]
    return [word for whole, match in zip(argv, found, strict=True)
            for word in (["guidance=cfg", f"guidance.scale={match[1]}"] if match else [whole])]  # fmt: skip


def with_texts(argv: list[str]) -> list[str]:
    """prompt=... may hold any sign: it is quoted, unless it is a list, quoted already, or a sweep."""
    found = [re.fullmatch(r"(prompt|negative)=(?!null$)([^\['\"].*)", word, flags=re.S) for word in argv]
    quoted = [f'{match[1]}="{_escaped(match[2])}"' if match else word for word, match in zip(argv, found, strict=True)]
    return argv if cli.is_multirun(argv) else quoted


def _escaped(text: str) -> str:
    """Within double quotes: Hydra takes a backslash for itself, but before a quotation mark."""
    return re.sub(r"(\\+)$", r"\1\1", re.sub(r'(\\*)"', r'\1\1\\"', text))


def task(composed: DictConfig) -> None:
    """Hydra calls it once, or once for each job of a sweep."""
    request = config.check_sample(config.plain(composed))
    from diffusion_cli.sampling import sample  # torch, now that the words are known to be right

    with cli.ending_sweeps():
        sample(request)
