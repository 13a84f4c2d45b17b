"""In what a denoiser works: pixels, or the latents of an autoencoder."""

from diffusion_cli.codecs.codec import Codec as Codec
from diffusion_cli.codecs.codec import Pixels as Pixels
from diffusion_cli.codecs.latent import Latent as Latent
