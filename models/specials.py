"""The four special tokens, which stand before the pages."""

PAD, BOS, EOS, UNK = range(4)
SPECIALS = ("[PAD]", "[BOS]", "[EOS]", "[UNK]")
