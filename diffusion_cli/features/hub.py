"""Features of networks of the Hugging Face hub, from its local cache: DINOv2 and CLIP, by transformers.

    pictures -> 224 x 224, bicubic with antialiasing as Pillow does, normalised -> DINOv2: the class token; CLIP: the embedding

Frechet distances in DINOv2 agree with people's judgement better than in Inception (Stein et al. 2023, "Exposing flaws of
generative model evaluation metrics", with ViT-L/14); CLIP is that of Kynkaanniemi et al. 2022, "The role of ImageNet classes in
Frechet inception distance", and of Jayasumana et al. 2024. Nothing is downloaded here.
"""

from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from diffusion_cli.assembly import Facts
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.features.features import Extractor, Features, Seen, colour, of_file
from diffusion_cli.vision import mend_torchvision

SIZE = 224


@dataclass(frozen=True)
class _OfHub(Features):
    """repo: its name on the hub; revision: a commit or branch; path: a folder with the model, instead of the cache."""

    repo: str
    revision: str = "main"
    path: str | None = None

    mean = (0.485, 0.456, 0.406)  # of ImageNet's pictures in [0, 1]
    std = (0.229, 0.224, 0.225)

    @abstractmethod
    def model(self, folder: Path) -> torch.nn.Module:
        """The network in that folder. Raises what transformers raises."""

    @abstractmethod
    def vectors(self, output: Any) -> Tensor:
        """[B, D] of what the network answers."""

    def open(self, facts: Facts, device: torch.device, trust: Collection[str] = ()) -> Extractor:
        folder = self._folder()
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise ConfigError(f"features={self.name}: {folder} has no model.safetensors; {self._ways_out()}")
        mend_torchvision()  # transformers imports it
        try:
            network = self.model(folder).to(device).eval()
        except Exception as error:  # of transformers, tokenizers, safetensors: whatever a folder that is no model raises
            raise StorageError(f"features={self.name}: {folder} cannot be used: {str(error).splitlines()[0]}") from None
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std))

        def look(images: Tensor) -> Seen:
            x = colour(images).float()
            x = nnf.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).round().clamp(0, 255) / 255
            return Seen(self.vectors(network(pixel_values=(x - mean) / std)))

        return Extractor(self.name, of_file(weights)[:16], look)

    def _folder(self) -> Path:
        if self.path is not None:
            return Path(self.path).expanduser()
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, ValueError) as error:
            reason = "is not in the cache" if isinstance(error, LocalEntryNotFoundError) else str(error).splitlines()[0]
            raise ConfigError(f"features={self.name}: {self.repo} {reason}; {self._ways_out()}") from None

    def _ways_out(self) -> str:
        return (
            f"hf download {self.repo} --revision {self.revision} --include config.json model.safetensors   or choose "
            "features.path=FOLDER, or features=classifier"
        )


@dataclass(frozen=True)
class DINOv2(_OfHub):
    repo: str = "facebook/dinov2-large"

    def model(self, folder: Path) -> torch.nn.Module:
        from transformers import Dinov2Model

        return Dinov2Model.from_pretrained(folder, local_files_only=True, use_safetensors=True)

    def vectors(self, output: Any) -> Tensor:
        return output.pooler_output  # the class token after the last norm


@dataclass(frozen=True)
class CLIP(_OfHub):
    repo: str = "openai/clip-vit-large-patch14"

    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def model(self, folder: Path) -> torch.nn.Module:
        from transformers import CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True, use_safetensors=True)

    def vectors(self, output: Any) -> Tensor:
        return output.image_embeds
