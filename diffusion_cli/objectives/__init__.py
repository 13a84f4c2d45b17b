"""What a trainer can train: an objective gives a loss for a batch, pictures to look at and figures to compare."""

from diffusion_cli.objectives.autoencoding import Autoencoding as Autoencoding
from diffusion_cli.objectives.classifying import Classifying as Classifying
from diffusion_cli.objectives.consistency import Consistency as Consistency
from diffusion_cli.objectives.contrasting import Contrasting as Contrasting
from diffusion_cli.objectives.coupling import Coupling as Coupling
from diffusion_cli.objectives.denoising import Denoising as Denoising
from diffusion_cli.objectives.mean_flow import MeanFlow as MeanFlow
from diffusion_cli.objectives.method import Method as Method
from diffusion_cli.objectives.objective import Objective as Objective
from diffusion_cli.objectives.objective import Tally as Tally
from diffusion_cli.objectives.progressive import Progressive as Progressive
from diffusion_cli.objectives.reflow import Reflow as Reflow
