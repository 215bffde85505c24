"""Blocks of transformers in fewer launches: what runs between their products, as one pass each.

``config`` is the method. A ``Forward`` stands in the place of one block's forward and runs ``flux`` and its siblings
where the block is as its class has it, and the block's own forward elsewhere (``plain_parts``). Products of layers that
take 8-bit codes share the codes of their common input (``codes``).
"""
