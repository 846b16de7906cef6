"""Slurm: asking it, and reading what it says. Differences between its versions stay here."""
