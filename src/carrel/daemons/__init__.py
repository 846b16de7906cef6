"""Loops and sockets around the decisions of ``carrel.core``. No policy here."""
