"""Text encoders of transformers as conditioners: CLIP's, T5's, those of sentences; from a folder or the hub's local cache.

Weights are safetensors, and no code is taken from the folder. Rombach et al. 2022 condition on CLIP's tokens after the last
norm, Saharia et al. 2022 on T5's; a T5 sees all of a text at once and is told which tokens are padding.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_cli.conditioning.conditioner import Conditioner
from diffusion_cli.conditioning.tokenizer import Tokens
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.ranges import PositiveInt
from diffusion_cli.vision import mend_torchvision

LONGEST = 1_000_000  # transformers writes 1e30 for a tokenizer that states no length


class Pretrained(Conditioner):
    """name: a folder, or owner/name on the hub; tokenizer: likewise where it lies elsewhere (`tokenizer` beside the
    `text_encoder` of a diffusers pipeline); length: tokens of a text, None for what the encoder itself states; masked: false
    leaves padding as the encoder gives it, none of it zero: Stable Diffusion's network was trained to read it.

    ConfigError: neither a folder nor in the cache, an encoder of another kind. StorageError: files that cannot be used.
    """

    def __init__(self, name: str, tokenizer: str | None = None, length: PositiveInt | None = None, masked: bool = True):
        super().__init__()
        self.folder = folder = _folder(name, ("*.json", "*.safetensors", "*.txt", "*.model"))
        self.beside = beside = folder if tokenizer is None else _folder(tokenizer, ("*.json", "*.txt", "*.model"))
        mend_torchvision()  # transformers imports it
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ConfigError(f"the text encoder {folder} needs transformers: pip install 'diffusion-cli[latent]'") from None

        kind = _kind(folder)
        try:
            words = AutoTokenizer.from_pretrained(beside, local_files_only=True, trust_remote_code=False)
            encoder = _encoder(kind, folder)
        except Exception as error:  # of transformers, tokenizers, safetensors: whatever a folder that is none raises
            raise StorageError(f"the text encoder {folder} cannot be used: {str(error).splitlines()[0]}") from None
        self.words, self.encoder = words, encoder.eval().requires_grad_(False)
        self.masked = masked
        stated_by: Any = encoder.config
        self.width = int(stated_by.hidden_size)
        places = getattr(stated_by, "max_position_embeddings", None)  # T5 has none: its positions are relative
        if kind == "mpnet":  # which counts them from the one after that of padding
            places -= stated_by.pad_token_id + 1
        stated = [n for n in (places, words.model_max_length) if n is not None and n < LONGEST]
        most = min(stated, default=512)
        if length is not None and places is not None and length > places:
            raise ConfigError(f"length is {length}, and the text encoder {folder} reads {places} tokens at most")
        self.length = most if length is None else length

    def tokenised(self, texts: Sequence[str]) -> Tokens:
        whole = [self.words(text, truncation=False, verbose=False)["input_ids"] for text in texts]
        cut = self.words(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt", verbose=False
        )
        ends = [ids[self.length - 1 :] if len(ids) > self.length else [] for ids in whole]  # the last place is the end mark's
        dropped = [str(self.words.decode(ids, skip_special_tokens=True)).strip() for ids in ends]
        mask = cut["attention_mask"].bool()
        return Tokens(cut["input_ids"], mask if self.masked else torch.ones_like(mask), dropped)

    def words_as_json(self) -> bytes:
        self.tokenised([""])  # which leaves its cutting and padding with the tokenizer in it
        if not hasattr(self.words, "backend_tokenizer"):
            raise ValueError(f"{type(self.words).__name__} is no tokenizer of the library tokenizers")
        return str(self.words.backend_tokenizer.to_str()).encode()

    def read(self, tokens: Tokens) -> Tensor:
        return self.encoder(input_ids=tokens.ids, attention_mask=tokens.mask.long()).last_hidden_state  # [B, L, D]


def _encoder(kind: str, folder: Path) -> nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()  # it draws one for the tensors of a single file
    found = getattr(transformers, ENCODERS[kind])
    return found.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)


# model_type of a config.json -> the class of transformers that holds the text encoder alone; the last three are what
# sentence encoders are made of
ENCODERS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "bert": "BertModel",
    "distilbert": "DistilBertModel",
    "mpnet": "MPNetModel",
}


def _kind(folder: Path) -> str:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(f"the text encoder {folder} cannot be used: its config.json: {error}") from None
    if kind not in ENCODERS:
        raise ConfigError(f"the text encoder {folder} is a {kind}: there is {', '.join(ENCODERS)}")
    return str(kind)


def _folder(name: str, wanted: tuple[str, ...]) -> Path:
    """The folder of that path, or of that name in the hub's cache. Nothing is downloaded."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError):
        includes = " ".join(f"--include '{pattern}'" for pattern in wanted)
        raise ConfigError(
            f"the text encoder {name} is no folder and not in the hub's cache: hf download {name} {includes}"
        ) from None
