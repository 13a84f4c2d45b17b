"""Figures of trained models, with their spread and how they were made.

Of real pictures: denoising.py, and likelihood.py in bits per dimension; of samples.py: distances.py to a reference.py in
features; nearest.py: the nearest training pictures, in pixels and in what the network sees (middle.py).
"""
