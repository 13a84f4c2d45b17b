"""Samplers: walks from noise to data that ask only denoise(x, t) -> x0, with any schedule and any prediction."""

from diffusion_cli.samplers.ancestral import Ancestral as Ancestral
from diffusion_cli.samplers.dpmpp import DPMpp2M as DPMpp2M
from diffusion_cli.samplers.grids import Beta as Beta
from diffusion_cli.samplers.grids import Grid as Grid
from diffusion_cli.samplers.grids import Karras as Karras
from diffusion_cli.samplers.grids import Leading as Leading
from diffusion_cli.samplers.grids import Linspace as Linspace
from diffusion_cli.samplers.grids import LogSNR as LogSNR
from diffusion_cli.samplers.grids import Own as Own
from diffusion_cli.samplers.grids import Quadratic as Quadratic
from diffusion_cli.samplers.grids import Tail as Tail
from diffusion_cli.samplers.grids import Trailing as Trailing
from diffusion_cli.samplers.grids import Uniform as Uniform
from diffusion_cli.samplers.heun import Heun as Heun
from diffusion_cli.samplers.sampler import Denoise as Denoise
from diffusion_cli.samplers.sampler import Noise as Noise
from diffusion_cli.samplers.sampler import Sampler as Sampler
from diffusion_cli.samplers.sampler import State as State
from diffusion_cli.samplers.sampler import last as last
