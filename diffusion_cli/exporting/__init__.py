"""A trained model for use elsewhere: a folder for diffusion-sample, for diffusers, one file, a graph, the hub."""

from diffusion_cli.exporting.run import export as export
