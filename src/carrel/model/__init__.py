"""Nouns: frozen structs without behaviour beyond what their own fields say."""
