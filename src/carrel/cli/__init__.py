"""The command line: ``carrel NOUN VERB``."""
