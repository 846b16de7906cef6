"""Carrel gives every Slurm job its own guest, a paid-up account, and a record of what it used."""

__version__ = "0.1.0"
