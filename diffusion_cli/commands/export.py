"""diffusion-export: a trained model as other programs read it."""

from omegaconf import DictConfig

from diffusion_cli import cli, config

ABOUT = """diffusion-export writes a trained model for use elsewhere, with a model card of what the run knows about itself.
All it needs is the run: ckpt=outputs/<name>. A folder appears whole or not at all; the same command finds it there."""

EXAMPLES = (
    ("diffusion-export ckpt=outputs/digits out=digits", "a folder for diffusion-sample ckpt=digits, and a card"),
    ("diffusion-export ckpt=outputs/digits to=diffusers label=none", "a pipeline of diffusers, where all of the model maps"),
    ("diffusion-export ckpt=outputs/digits to=onnx steps=50", "the network for onnxruntime, and the numbers of a walk"),
    ("diffusion-export ckpt=outputs/digits to=torch_export weights=raw", "a .pt2 of the weights as trained"),
    ("diffusion-export ckpt=outputs/digits to=safetensors", "one file: weights, and the config in its header"),
    ("diffusion-export ckpt=outputs/digits to=hub repo=OWNER/NAME", "pushed to the hub, private unless private=false"),
)


def main() -> None:
    page = lambda: cli.help_page("diffusion-export", "export", ABOUT, (), EXAMPLES)  # noqa: E731
    cli.run("diffusion-export", "export", task, page, lambda argv: argv)


def task(composed: DictConfig) -> None:
    """Hydra calls it once, or once for each job of a sweep."""
    settings = config.check_export(config.plain(composed))
    from diffusion_cli.exporting import export  # torch, now that the words are known to be right

    export(settings)
