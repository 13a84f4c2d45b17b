"""A picture encoder and a text encoder with one space between them: CLIP, built by transformers at a size of one's own.

    picture -> patches -> transformer -> class token -> linear -> u / |u|       [B, E]
    tokens  -> causal transformer -> the token END    -> linear -> v / |v|       [B, E]
    similarity of a picture and a text: cos = u . v, and exp(logit_scale) cos is what a softmax is given

Radford et al. 2021, "Learning transferable visual models from natural language supervision", section 2. Padding follows END and
the text encoder is causal, so it changes nothing before it and no mask is needed.
"""

import torch.nn.functional as nnf
from torch import Tensor, nn

from diffusion_cli.ranges import PositiveInt, Rate
from diffusion_cli.vision import mend_torchvision

START, END, PAD = 0, 1, 2  # tokens; END is not 2, which transformers takes for a mistake of old CLIP configs


class Clip(nn.Module):
    """channels, image_size: of the pictures; vocabulary: tokens there are. All three are facts of the data.

    patch: pixels of a side of a patch; embedding: E; length: tokens of a text at most, START and END included.
    ValueError: a size that patches do not divide, a width that heads do not divide.
    """

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        vocabulary: PositiveInt,
        width: PositiveInt = 192,
        depth: PositiveInt = 4,
        heads: PositiveInt = 3,
        patch: PositiveInt = 8,
        text_width: PositiveInt = 128,
        text_depth: PositiveInt = 3,
        text_heads: PositiveInt = 2,
        embedding: PositiveInt = 128,
        length: PositiveInt = 77,
        dropout: Rate = 0.0,
    ):
        super().__init__()
        if image_size % patch:
            raise ValueError(f"patch is {patch} and image_size {image_size}: patches must divide the size; choose a divisor")
        for name, (size, parts) in {"width": (width, heads), "text_width": (text_width, text_heads)}.items():
            if size % parts:
                raise ValueError(f"{name} is {size}, shared by {parts} heads: choose a multiple of {parts}")
        if length < 3:
            raise ValueError(f"length is {length}: a text needs a start, an end and a token between")
        mend_torchvision()  # transformers imports it
        from transformers import CLIPConfig, CLIPModel

        self.channels, self.image_size, self.length, self.text_width = channels, image_size, length, text_width
        vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth, "patch_size": patch}
        vision |= {"num_attention_heads": heads, "image_size": image_size, "num_channels": channels}
        text = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": text_depth}
        text |= {"num_attention_heads": text_heads, "max_position_embeddings": length, "vocab_size": vocabulary}
        text |= {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
        both = {"projection_dim": embedding, "attention_dropout": dropout}
        self.model = CLIPModel(CLIPConfig(text_config=text | both, vision_config=vision | both, projection_dim=embedding))

    @property
    def logit_scale(self) -> nn.Parameter:
        """Scalar: the logarithm of the inverse temperature; exp(2.659) = 1/0.07 at first."""
        return self.model.logit_scale

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W] in [-1, 1], tokens [B, L] int64 -> of each [B, E] float32, of length 1."""
        return self.pictures(x), self.texts(tokens)

    def pictures(self, x: Tensor) -> Tensor:
        """[B, E] float32, of length 1."""
        pooled = self.model.vision_model(pixel_values=x).pooler_output  # [B, width]
        return nnf.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def texts(self, tokens: Tensor) -> Tensor:
        """[B, E] float32, of length 1. L may be any number up to `length` that holds every END."""
        pooled = self.model.text_model(input_ids=tokens).pooler_output  # [B, text_width]
        return nnf.normalize(self.model.text_projection(pooled).float(), dim=-1)

    def read(self, tokens: Tensor) -> Tensor:
        """[B, L, text_width]: each token after the last norm, as a denoiser is conditioned on them; also of padding."""
        return self.model.text_model(input_ids=tokens).last_hidden_state
