"""Editing: where a walk begins (starts.py), and what binds it on its way (edit.py)."""

from diffusion_cli.editing.edit import Edit as Edit
from diffusion_cli.editing.edit import Free as Free
from diffusion_cli.editing.starts import FromPicture as FromPicture
from diffusion_cli.editing.starts import PureNoise as PureNoise
from diffusion_cli.editing.starts import Start as Start
