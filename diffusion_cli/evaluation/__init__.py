"""Figures of trained models: likelihood.py in bits per dimension; nearest.py, the nearest training pictures."""
