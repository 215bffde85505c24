"""The run of one pipeline call: probe its preparation, then drive a sampler in the place of its loop."""
