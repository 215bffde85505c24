"""Features of whole sets of images: cached extraction, sets loaded from images or files, and files of statistics."""
