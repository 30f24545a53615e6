"""The neighbouring papers' systems on the same primitives: each a table with intervals and a null."""
