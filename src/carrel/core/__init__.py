"""Decisions: pure, synchronous, no clock, no file, no socket."""
