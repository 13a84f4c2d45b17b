"""diffusion-evaluate: figures of a checkpoint."""

from omegaconf import DictConfig

from diffusion_cli import cli, config
from diffusion_cli.commands.sample import with_scale

ABOUT = """diffusion-evaluate measures a trained model. All it needs is the run: ckpt=outputs/<name>.
  on real pictures   denoising (error by noise level), bound (bits per dimension at most), bits (by the probability flow),
                     vlb (bits at most, of the steps of sampler=ddpm)
  of its samples     fid, kid, inception_score, precision, recall, density, coverage, class_accuracy: compared in features=
                     sliced_wasserstein: in pixels; clip_score, clip_score_shuffled: beside their captions
  of an autoencoder  reconstruction (PSNR, SSIM, errors of each picture), and what there is of samples: of what it gives back
                     of held-out pictures, beside these
It prints each figure with its spread, and keeps it in a JSON file with how it was made and in the run's TensorBoard. The same
command goes on after a stop; torchrun --nproc-per-node 8 --no-python diffusion-evaluate ... shares the work out to 8 GPUs."""

GROUPS = ("features", "sampler", "guidance")

EXAMPLES = (
    ("diffusion-evaluate ckpt=outputs/digits", "error by noise level, bits at most"),
    ("diffusion-evaluate ckpt=outputs/digits metrics=[bits] n=64", "bits by the probability flow"),
    ("diffusion-evaluate ckpt=outputs/cifar data=~/cifar10 split=train", "on training pictures that have moved"),
    ("diffusion-evaluate ckpt=RUN n=50000 metrics=[fid,kid] features=inception repeats=3", "the published figures"),
    ("diffusion-evaluate ckpt=RUN metrics=[kid] features=classifier features.ckpt=OTHER", "by a classifier of your own"),
    ("diffusion-evaluate ckpt=RUN metrics=[kid] features=random sampler=ddim guidance=2", "with no weights of others"),
    ("diffusion-evaluate ckpt=AUTOENCODER metrics=[reconstruction,kid] features=random", "what it gives back"),
)


def main() -> None:
    page = lambda: cli.help_page("diffusion-evaluate", "evaluate", ABOUT, GROUPS, EXAMPLES)  # noqa: E731
    cli.run("diffusion-evaluate", "evaluate", task, page, with_scale)


def task(composed: DictConfig) -> None:
    """Hydra calls it once, or once for each job of a sweep."""
    wanted = config.check_evaluate(config.plain(composed))
    from diffusion_cli.evaluation.run import evaluate  # torch, now that the words are known to be right

    with cli.ending_sweeps():
        evaluate(wanted)
