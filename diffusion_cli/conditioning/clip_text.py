"""The text half of a CLIP that this project trained, as a conditioner."""

from collections.abc import Sequence

from torch import Tensor

from diffusion_cli.conditioning.conditioner import Conditioner
from diffusion_cli.conditioning.tokenizer import Tokenizer, Tokens
from diffusion_cli.models.clip import Clip


class ClipText(Conditioner):
    """clip, tokenizer: of one checkpoint (finding.py, load_clip); masked: is padding to be zero? The tokens are those after the
    last norm."""

    def __init__(self, clip: Clip, tokenizer: Tokenizer, masked: bool = True):
        super().__init__()
        self.encoder = clip.model.text_model.eval().requires_grad_(False)  # the pictures' half is not carried along
        self.tokenizer, self.masked = tokenizer, masked
        self.width, self.length = clip.text_width, clip.length

    def tokenised(self, texts: Sequence[str]) -> Tokens:
        return self.tokenizer.encode(texts, self.length)

    def words_as_json(self) -> bytes:
        return self.tokenizer.whole(self.length)

    def read(self, tokens: Tokens) -> Tensor:
        return self.encoder(input_ids=tokens.ids).last_hidden_state  # [B, L, D]
