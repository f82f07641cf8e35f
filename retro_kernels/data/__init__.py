"""Text to tokens: documents out of files (corpus), and a lossless tokenizer (tokenizer)."""
