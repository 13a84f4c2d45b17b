"""Sweeps: many runs from one command. A sweeper says which jobs there are, a launcher where they run; free of torch."""
