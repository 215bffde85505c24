"""MixDQ: which layers have how many bits, by what each costs the picture (arXiv 2405.17873)."""
