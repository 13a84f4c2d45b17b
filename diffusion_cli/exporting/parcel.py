"""What every form of export starts from, and what it makes: files, and the words of the model card that are about them."""

from dataclasses import dataclass, replace
from typing import Any

from diffusion_cli.assembly import Facts, denoiser_of
from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.settings import Export

MEAN_ALONE = "Without what the network has learned of variances: its steps are those of a fixed variance, or have no noise."


@dataclass(frozen=True)
class Model:
    """A trained denoiser in evaluation mode on the CPU, with the checkpoint that it comes from and what is asked of it."""

    found: Checkpoint
    denoiser: Denoiser
    settings: Export

    @property
    def node(self) -> dict[str, Any]:
        """The run's whole config."""
        node: dict[str, Any] = self.found.config["config"]
        return node

    @property
    def facts(self) -> Facts:
        facts: Facts = self.found.config["facts"]
        return facts

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a picture: channels, height, width."""
        return self.facts["channels"], self.facts["image_size"], self.facts["image_size"]

    @property
    def diffused(self) -> tuple[int, int, int]:
        """Of what the network works on: a picture's, or that of its latents."""
        network = self.denoiser.network
        return network.channels, network.image_size, network.image_size

    def of_mean(self) -> "Model":
        """Without learned variances: of the network's last layer the rows that say the mean."""
        if not self.denoiser.network.variance_channels:
            return self
        model = {key: value for key, value in self.node["model"].items() if key != "out_channels"}
        node = {**self.node, "model": model, "objective": {**self.node["objective"], "term": None}}
        made, weights = denoiser_of(node, self.facts, self.settings.trust), self.denoiser.state_dict()
        made.load_state_dict(
            {name: weights[name][: len(value)] if value.dim() else weights[name] for name, value in made.state_dict().items()}
        )
        return replace(self, denoiser=made.eval().requires_grad_(False))

    @property
    def trust(self) -> str:
        """The word that lets a command build the classes of the user's own packages; empty where there is no need."""
        return f"trust=[{','.join(self.settings.trust)}]" if self.settings.trust else ""


@dataclass(frozen=True)
class Parcel:
    """files: by name. use: Markdown, how to load them. library: what loads them, in the
    hub's words. limits: what does not hold of the model in this form."""

    files: dict[str, bytes]
    use: str
    library: str
    tags: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
