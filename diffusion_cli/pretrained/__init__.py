"""Models that others trained: pipelines of diffusers, from a folder or the hub, in the words of our own configs."""
