"""The ring of earlier frames for diffusers' ``AnyFlowFARTransformer3DModel`` (FAR, arXiv 2503.19325; 2605.13724).

``grid`` says how a frame lies in tokens and turns its keys, ``memory`` who writes and reads where in one evaluation,
``evaluation`` is that, and ``engine`` what is kept from chunk to chunk.
"""
