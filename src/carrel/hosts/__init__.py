"""Hosts that carry guests-as-nodes: their table, what of them is taken by whom, and addresses for their guests."""
