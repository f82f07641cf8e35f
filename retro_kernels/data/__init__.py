"""Text to tokens: documents out of files (corpus), and a lossless tokenizer (tokenizer)."""

from .corpus import Document, ReadReport, document_hash, read_documents, split_documents
from .tokenizer import Tokenizer

__all__ = ["Document", "ReadReport", "Tokenizer", "document_hash", "read_documents", "split_documents"]
