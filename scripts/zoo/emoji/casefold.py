"""A SentencePiece character map that turns A-Z into a-z.

Of the normalizers that a T5 tokenizer can have, transformers restores only this kind when it loads the tokenizer. The
map is a double-array trie in SentencePiece's format: the trie's size in bytes, its 32-bit units, then the replacements,
each ended by a zero byte.
"""

from __future__ import annotations

import string
import struct

# A unit with label c has c in its low byte; bit 8 says that a value follows, bits 10 and up hold the offset to the next
# units, which is combined with the node by exclusive or. Single letters need one level below the root.
_LEAF, _OFFSET = 1 << 8, 10
_CHILDREN, _VALUES = 256, 512  # letter c is at 256 ^ c, its value at 256 ^ c ^ 512


def lower_case_map() -> bytes:
    """Return the map's bytes, for ``T5Tokenizer(_spm_precompiled_charsmap=...)``."""
    units = [0] * 1024
    units[0] = _CHILDREN << _OFFSET
    replacements = bytearray()
    for letter in string.ascii_uppercase:
        node = _CHILDREN ^ ord(letter)
        units[node] = ord(letter) | _LEAF | (_VALUES << _OFFSET)
        units[node ^ _VALUES] = len(replacements) | 1 << 31  # the top bit marks a value
        replacements += letter.lower().encode() + b"\0"
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + bytes(replacements)
