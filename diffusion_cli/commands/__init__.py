"""The commands: the only floor that sees Hydra, OmegaConf or a terminal."""
