"""Property tests take as long as they need: on a busy machine an absolute time says nothing of the code."""

from hypothesis import settings

settings.register_profile("carrel", settings(), deadline=None)
settings.load_profile("carrel")
