"""Networks: F = network(x, time, cond), classifiers: logits = classifier(x, time), and autoencoders. They know tensors, never
schedules."""

from diffusion_cli.models.autoencoder import Autoencoder as Autoencoder
from diffusion_cli.models.autoencoder import AutoencoderKL as AutoencoderKL
from diffusion_cli.models.autoencoder import AutoencoderVQ as AutoencoderVQ
from diffusion_cli.models.classifier import Classifier as Classifier
from diffusion_cli.models.classifier import Encoder as Encoder
from diffusion_cli.models.clip import Clip as Clip
from diffusion_cli.models.ddpmpp import DDPMpp as DDPMpp
from diffusion_cli.models.diffusers_text import AuraFlow as AuraFlow
from diffusion_cli.models.diffusers_text import UNet2DCondition as UNet2DCondition
from diffusion_cli.models.diffusers_unet import UNet2D as UNet2D
from diffusion_cli.models.dit import DiT as DiT
from diffusion_cli.models.edm2 import EDM2 as EDM2
from diffusion_cli.models.mmdit import MMDiT as MMDiT
from diffusion_cli.models.network import Network as Network
from diffusion_cli.models.transformer import Transformer as Transformer
from diffusion_cli.models.unet import UNet as UNet
from diffusion_cli.models.unet_basic import UNetBasic as UNetBasic
from diffusion_cli.models.unet_gated import UNetGated as UNetGated
from diffusion_cli.models.uvit import UViT as UViT
