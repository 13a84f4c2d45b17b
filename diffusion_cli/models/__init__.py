"""Networks: F = network(x, time, cond). They know tensors, never schedules. One file each."""

from diffusion_cli.models.dit import DiT as DiT
from diffusion_cli.models.network import Network as Network
from diffusion_cli.models.unet import UNet as UNet
from diffusion_cli.models.unet_basic import UNetBasic as UNetBasic
from diffusion_cli.models.unet_gated import UNetGated as UNetGated
