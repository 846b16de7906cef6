"""The sampler of a node, and the files that it writes. Nothing here but the standard library is in the hot path."""
