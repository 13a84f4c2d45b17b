"""What pictures are compared in: features of networks that were trained here or elsewhere, of pixels, of random networks."""

from diffusion_cli.features.classifier import Classifier as Classifier
from diffusion_cli.features.clip_run import ClipRun as ClipRun
from diffusion_cli.features.features import Extractor as Extractor
from diffusion_cli.features.features import Features as Features
from diffusion_cli.features.features import Seen as Seen
from diffusion_cli.features.fixed import Random as Random
from diffusion_cli.features.fixed import Raw as Raw
from diffusion_cli.features.hub import CLIP as CLIP
from diffusion_cli.features.hub import DINOv2 as DINOv2
from diffusion_cli.features.inception import Inception as Inception
