"""Drafts: many cheap samples of one prompt, of which the best are finished in full (arXiv 2607.04461)."""
