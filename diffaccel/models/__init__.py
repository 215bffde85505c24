"""Networks of our own, as diffusers models."""
