"""Arrays to embeddings to similarity to loss. Towers meet only as a similarity matrix; only `weights` opens files."""
