#!/usr/bin/env python3
"""What text to image costs: python scripts/bench_text.py outputs/text_to_image_openmoji [--rounds 5]

1. Training, images a second: the run's own recipe, latents of its autoencoder and tokens of its text encoder made anew at each
   step (objective.cache=false) and read from the cache.
2. Sampling beside diffusers' StableDiffusionPipeline in the same process: the same weights (random, of a small network), the
   same scheduler (DDIM, 20 steps), prompts and guidance, the decoder counted in.

The two sides alternate; figures are medians, samples that other processes disturbed are dropped. Columns as in bench.py.
"""

import argparse
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from bench import hardware
from timing import Contestant, compare, table, take_turns

from diffusion_cli import config
from diffusion_cli.assembly import objective_of
from diffusion_cli.build import build
from diffusion_cli.data import Batches, Dataset, Pictures
from diffusion_cli.data.pixels import to_uint8
from diffusion_cli.devices import choose
from diffusion_cli.finding import find
from diffusion_cli.optimizers import Optimizer
from diffusion_cli.pace import Pace
from diffusion_cli.pretrained.trained import Trained
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import last
from diffusion_cli.sampling.maker import maker_of
from diffusion_cli.stages import stages_of
from diffusion_cli.vision import mend_torchvision

BATCH, STEPS = 16, 20
PROMPTS = ["red square", "a blue circle", "yellow face", "apple"]


def training(found: Trained, pictures: Pictures, cache: bool, device: torch.device) -> Callable[[], None]:
    """One step of the run's own training."""
    node = {**found.config["config"], "objective": {**found.config["config"]["objective"], "cache": cache}}
    objective = objective_of(node, found.config["facts"], stages=stages_of(found)).to(device)
    objective.meet(pictures, device, node["dataset"]["flip"])
    optimizer = build(node["optimizer"], Optimizer, "optimizer").make(objective.parameters())
    batches = Batches(pictures, Pace(BATCH), 0, node["dataset"]["flip"], device).starting_at(0)
    slots, steps = torch.arange(BATCH, device=device), count()

    def step() -> None:
        loss, _ = objective.loss(next(batches), Source(0, slots, next(steps)))
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def stable_diffusion(folder: Path) -> Any:
    """A pipeline of random weights, saved: 64x64 pictures, 16x16 latents, 2.6M weights in the U-Net."""
    import diffusers
    from tokenizers import Tokenizer as Made
    from tokenizers import processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    from diffusion_cli.conditioning import learned
    from diffusion_cli.models.clip import END, PAD, START

    torch.manual_seed(0)
    made = Made.from_str(learned(PROMPTS * 3, 300))
    made.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", START), ("<|end|>", END)]
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>", model_max_length=77
    )
    encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, bos_token_id=START,
                       eos_token_id=END, pad_token_id=PAD, vocab_size=made.get_vocab_size())
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 128), layers_per_block=1, norm_num_groups=8, cross_attention_dim=128,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 64), norm_num_groups=8, sample_size=64, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=words, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampling(folder: Path, device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    """Theirs and ours: a picture of each prompt."""
    pipeline = stable_diffusion(folder).to(device)
    words = [f"ckpt={folder}", f"prompt=[{','.join(PROMPTS)}]", "guidance=cfg", "guidance.scale=5", f"sampler.steps={STEPS}"]
    request = config.check_sample(composed([*words, f"device={device.type}"]))
    maker = maker_of(request, find(folder), choose(device.type, "fp32", False, lambda line: None))
    ids = torch.arange(len(PROMPTS), device=device)

    def ours() -> object:
        with torch.inference_mode():
            return to_uint8(maker.pictures(last(maker.states(ids)).x)).cpu()

    def theirs() -> object:
        return pipeline(PROMPTS, num_inference_steps=STEPS, guidance_scale=5.0, output_type="np")

    return theirs, ours


def composed(words: list[str]) -> dict[str, Any]:
    import hydra

    with hydra.initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        return config.plain(hydra.compose("sample", words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", help="where the run's pictures lie, if they moved")
    asked = parser.parse_args()
    mend_torchvision()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = find(asked.run)
    dataset = {**found.config["config"]["dataset"], **({"path": asked.data} if asked.data else {})}
    pictures = build(dataset, Dataset, "dataset").load("train")
    assert pictures is not None
    steps = [
        Contestant("made at each step", training(found, pictures, False, device), BATCH),
        Contestant("read from the cache", training(found, pictures, True, device), BATCH),
    ]
    with tempfile.TemporaryDirectory() as folder:
        walks = [
            Contestant(name, call, len(PROMPTS))
            for name, call in zip(("diffusers", "ours"), sampling(Path(folder), device), strict=True)
        ]
        rows = []
        for what, (peer, ours) in (("training, batch 16", steps), (f"sampling, DDIM {STEPS}, guided", walks)):
            for contestant in (peer, ours):
                contestant.call()
            samples = take_turns([ours, peer], asked.rounds, 3 * asked.rounds)
            rows.append(compare(what, "images/s", ours, peer, samples))
    print(hardware(device))
    print(table(rows))


if __name__ == "__main__":
    main()
