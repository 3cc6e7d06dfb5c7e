"""Arrays to embeddings to similarity to loss. Towers meet only as a similarity matrix.

Only `weights` and `vipant` open files.
"""
