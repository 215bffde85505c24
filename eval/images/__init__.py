"""Sets of images: open a folder, zip, npz or tensor as one ordered source, decode its files, read ahead in threads or
processes, and read the frames of videos."""
