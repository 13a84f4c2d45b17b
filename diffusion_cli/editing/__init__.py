"""Editing: where a walk begins (starts.py, inversion.py), what is known of the picture (edit.py), how that binds the walk."""

from diffusion_cli.editing.edit import Colour as Colour
from diffusion_cli.editing.edit import Edit as Edit
from diffusion_cli.editing.edit import Inpaint as Inpaint
from diffusion_cli.editing.edit import Outpaint as Outpaint
from diffusion_cli.editing.edit import Upscale as Upscale
from diffusion_cli.editing.gradients import Guided as Guided
from diffusion_cli.editing.gradients import Moments as Moments
from diffusion_cli.editing.inversion import AddsNoise as AddsNoise
from diffusion_cli.editing.inversion import adds_noise as adds_noise
from diffusion_cli.editing.inversion import invert as invert
from diffusion_cli.editing.known import Blocks as Blocks
from diffusion_cli.editing.known import Grey as Grey
from diffusion_cli.editing.known import Known as Known
from diffusion_cli.editing.known import Operator as Operator
from diffusion_cli.editing.known import Seen as Seen
from diffusion_cli.editing.method import Method as Method
from diffusion_cli.editing.method import Question as Question
from diffusion_cli.editing.original import Original as Original
from diffusion_cli.editing.particles import Particles as Particles
from diffusion_cli.editing.projection import Projection as Projection
from diffusion_cli.editing.starts import Between as Between
from diffusion_cli.editing.starts import FromPicture as FromPicture
from diffusion_cli.editing.starts import PureNoise as PureNoise
from diffusion_cli.editing.starts import Start as Start
from diffusion_cli.editing.starts import Varied as Varied
