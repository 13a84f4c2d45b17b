"""Pictures from a checkpoint: network, schedule, prediction and facts of the data come from it, so nothing contradicts it."""

from diffusion_cli.sampling.run import sample as sample
