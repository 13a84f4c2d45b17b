"""diffusion-report: runs as one page that opens in a browser, without a server."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from diffusion_cli import cli, config
from diffusion_cli.errors import ConfigError, UserError

ABOUT = """diffusion-report writes one HTML file of a run, of a sweep or of several: samples over training, curves, figures,
configs, a table that sorts and filters, two runs side by side. It opens by double click: no server, no network."""

EXAMPLES = (
    ("diffusion-report outputs/digits", "one run; the page is outputs/digits/report.html"),
    ("diffusion-report outputs/sweep", "every run of a sweep"),
    ("diffusion-report outputs/a outputs/b out=both.html", "two runs side by side"),
    ("diffusion-report outputs", "every run that there is"),
)


def main() -> None:
    page = lambda: cli.help_page("diffusion-report", "report", ABOUT, (), EXAMPLES)  # noqa: E731
    try:
        sys.argv[1:] = with_runs(sys.argv[1:])
    except UserError as error:
        sys.exit(cli.tell("diffusion-report", error))
    cli.run("diffusion-report", "report", task, page, lambda argv: argv)


def with_runs(argv: list[str]) -> list[str]:
    """outputs/a outputs/b, as a shell completes them, is short for runs=['outputs/a','outputs/b']."""
    folders = [word for word in cli.overrides(argv) if "=" not in word or Path(word).is_dir()]
    folders = [word for word in folders if not word.startswith(("+", "~", "="))]
    if not folders:
        return argv
    if any(word.startswith("runs=") for word in argv):
        raise ConfigError(f"{folders[0]}: folders are named either so or by runs=[...], not both")
    quoted = ",".join("'" + word.replace("'", r"\'") + "'" for word in folders)
    return [*(word for word in argv if word not in folders), f"runs=[{quoted}]"]


def task(composed: DictConfig) -> None:
    """Hydra calls it once."""
    settings = config.check_report(config.plain(composed))
    from diffusion_cli.report.making import make  # Pillow and Jinja, now that the words are known to be right

    make(settings)
