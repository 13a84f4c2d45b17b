"""diffusion-sample: pictures from a checkpoint."""

from omegaconf import DictConfig

from diffusion_cli import cli, config

ABOUT = """diffusion-sample makes pictures with a trained model. All it needs is the run: ckpt=outputs/<name>.
It writes single pictures, a grid and a metadata file; picture i of a seed is the same at any n and batch."""

GROUPS = ("sampler", "guidance", "edit")

EXAMPLES = (
    ("diffusion-sample ckpt=outputs/digits n=64", "single pictures and a grid"),
    ("diffusion-sample ckpt=outputs/digits sampler=dpmpp_2m sampler.steps=10", "another sampler, fewer steps"),
    ("diffusion-sample ckpt=outputs/digits trajectory=true n=16", "also a strip and a GIF from noise to picture"),
    ("diffusion-sample ckpt=outputs/digits/checkpoints/step_00002400 weights=raw", "that checkpoint, weights as trained"),
    ("diffusion-sample ckpt=outputs/cifar label=horse seed=7 out=horses", "one class, to a folder of your choice"),
    ("diffusion-sample ckpt=outputs/digits n=10000 batch=500 format=npz", "many, in one array"),
)


def main() -> None:
    page = lambda: cli.help_page("diffusion-sample", "sample", ABOUT, GROUPS, EXAMPLES)  # noqa: E731
    cli.run("diffusion-sample", "sample", task, page, lambda argv: argv)


def task(composed: DictConfig) -> None:
    """Hydra calls it once, or once for each job of a sweep."""
    request = config.check_sample(config.plain(composed))
    from diffusion_cli.sampling import sample  # torch, now that the words are known to be right

    sample(request)
