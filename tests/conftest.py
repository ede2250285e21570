"""Settings of all tests."""

from hypothesis import settings

# a busy machine is no failure: examples have no time limit of their own, tests have pytest's
settings.register_profile("ifguide", deadline=None)
settings.load_profile("ifguide")
