"""Pictures: where they come from (a `Dataset`), what was read (`Pictures`), and the endless sequence of `Batches`."""

from diffusion_cli.data.augment import Augment as Augment
from diffusion_cli.data.batches import Batch as Batch
from diffusion_cli.data.batches import Batches as Batches
from diffusion_cli.data.dataset import Dataset as Dataset
from diffusion_cli.data.digits import Digits as Digits
from diffusion_cli.data.folder import Folder as Folder
from diffusion_cli.data.hub import Hub as Hub
from diffusion_cli.data.pictures import Pictures as Pictures
