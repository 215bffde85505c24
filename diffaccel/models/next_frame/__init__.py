"""A world model that draws a video frame by frame, each from the frames before it and an action (arXiv 2506.01380).

``transformer`` is the network, ``block`` one of its layers, ``rotary`` and ``mask`` what its attention knows of time
and place. ``cache`` is the ring of earlier frames, ``cached`` the attention to it, ``engine`` the rounds that draw
frames, ``pipeline`` the diffusers pipeline.
"""
