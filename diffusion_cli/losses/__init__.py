"""The training loss of a denoiser: at which times it is asked, by which norm it is judged, and how each noise level counts."""

from diffusion_cli.losses.critic import PatchCritic as PatchCritic
from diffusion_cli.losses.loss import Loss as Loss
from diffusion_cli.losses.norms import MAE as MAE
from diffusion_cli.losses.norms import MSE as MSE
from diffusion_cli.losses.norms import Adaptive as Adaptive
from diffusion_cli.losses.norms import Huber as Huber
from diffusion_cli.losses.norms import Norm as Norm
from diffusion_cli.losses.perceptual import Perceptual as Perceptual
from diffusion_cli.losses.terms import Contrastive as Contrastive
from diffusion_cli.losses.terms import Dispersive as Dispersive
from diffusion_cli.losses.terms import Term as Term
from diffusion_cli.losses.terms import Told as Told
from diffusion_cli.losses.times import Discrete as Discrete
from diffusion_cli.losses.times import Importance as Importance
from diffusion_cli.losses.times import LogitNormal as LogitNormal
from diffusion_cli.losses.times import LogNormal as LogNormal
from diffusion_cli.losses.times import LowDiscrepancy as LowDiscrepancy
from diffusion_cli.losses.times import Times as Times
from diffusion_cli.losses.times import Uniform as Uniform
from diffusion_cli.losses.weights import P2 as P2
from diffusion_cli.losses.weights import EDMWeight as EDMWeight
from diffusion_cli.losses.weights import Learned as Learned
from diffusion_cli.losses.weights import MinSNR as MinSNR
from diffusion_cli.losses.weights import One as One
from diffusion_cli.losses.weights import Sigmoid as Sigmoid
from diffusion_cli.losses.weights import Weight as Weight
