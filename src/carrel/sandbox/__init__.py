"""A real Slurm cluster in one private directory."""
