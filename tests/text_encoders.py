"""Text encoders of transformers with random weights, each with its tokenizer: a CLIP's, T5, UMT5, BERT and MPNet."""

from typing import Any

import torch

from diffusion_cli.conditioning import learned
from diffusion_cli.models.clip import END, PAD, START
from diffusion_cli.vision import mend_torchvision

TEXTS = ["grinning face", "grinning cat", "cat face", "the moon, half seen", "face of a cat"] * 3
WIDTH, LENGTH = 16, 12


def encoders() -> dict[str, tuple[Any, Any]]:
    """By model_type: encoder and tokenizer."""
    mend_torchvision()  # transformers imports it
    from tokenizers import Tokenizer as Made
    from tokenizers import processors
    from transformers import (
        BertConfig,
        BertModel,
        CLIPTextConfig,
        CLIPTextModel,
        MPNetConfig,
        MPNetModel,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
        UMT5Config,
        UMT5EncoderModel,
    )

    torch.manual_seed(0)
    base = Made.from_str(learned(TEXTS, 300))
    size = base.get_vocab_size()
    marks = [("<|start|>", START), ("<|end|>", END)]
    sizes = {"vocab_size": size, "bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    clip = CLIPTextModel(
        CLIPTextConfig(hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                       max_position_embeddings=LENGTH, **sizes)
    )  # fmt: skip
    keys = {"d_model": WIDTH, "d_ff": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": size, "pad_token_id": PAD}
    t5, umt5 = T5EncoderModel(T5Config(**keys)), UMT5EncoderModel(UMT5Config(**keys))
    layers = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**layers, vocab_size=size, pad_token_id=PAD, max_position_embeddings=LENGTH))
    mpnet = MPNetModel(MPNetConfig(**layers, vocab_size=size, pad_token_id=PAD, max_position_embeddings=LENGTH + PAD + 1))
    found = {}
    for name, encoder in (("clip", clip), ("t5", t5), ("umt5", umt5), ("bert", bert), ("mpnet", mpnet)):
        template = "$A <|end|>" if name.endswith("t5") else "<|start|> $A <|end|>"
        base.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=base, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>", model_max_length=LENGTH
        )
        found[name] = (encoder.eval().requires_grad_(False), fast)
    return found
