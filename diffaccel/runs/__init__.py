"""One run: a request becomes pipeline calls and a folder of images, resumable and shared by any number of processes."""
