"""Inputs of a comparison: prompt sets, requests, runs as folders of pictures, and the candidates that draw them."""
