"""QEMU, driven directly: no daemon of another project owns the truth about our guests."""
