"""Training frameworks and model libraries: how tests import them, and what they launch."""
