"""Networks that look at pictures: feature extractors and their protocols, LPIPS, preference scorers, video networks,
and the search for their weights."""
