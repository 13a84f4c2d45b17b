"""Train and sample image diffusion models from the command line. The rooms and their floors: docs/architecture.md."""

__version__ = "0.1.0"
