"""Images: what a guest is cloned from; named by content hash, tagged by people."""
