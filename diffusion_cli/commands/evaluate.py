"""diffusion-evaluate: figures of a checkpoint."""

from omegaconf import DictConfig

from diffusion_cli import cli, config

ABOUT = """diffusion-evaluate measures a trained model on held-out pictures. All it needs is the run: ckpt=outputs/<name>.
It prints each figure with its standard error and writes a JSON file with how it was made."""

EXAMPLES = (
    ("diffusion-evaluate ckpt=outputs/digits", "denoising error, and bits per dimension at most"),
    ("diffusion-evaluate ckpt=outputs/digits metrics=[bits] n=64", "bits per dimension by the probability flow"),
    ("diffusion-evaluate ckpt=outputs/cifar data=~/cifar10 split=train", "on the training pictures, which lie elsewhere now"),
)


def main() -> None:
    page = lambda: cli.help_page("diffusion-evaluate", "evaluate", ABOUT, (), EXAMPLES)  # noqa: E731
    cli.run("diffusion-evaluate", "evaluate", task, page, lambda argv: argv)


def task(composed: DictConfig) -> None:
    """Hydra calls it once, or once for each job of a sweep."""
    settings = config.check_evaluate(config.plain(composed))
    from diffusion_cli.evaluation.run import evaluate  # torch, now that the words are known to be right

    evaluate(settings)
