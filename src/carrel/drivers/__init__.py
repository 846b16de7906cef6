"""Drivers: one kind of guest each. They never import each other."""
