"""Chunks to neighbours: the retrieval set on disk, its index, and the retriever that a training step calls."""
