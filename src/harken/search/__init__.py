"""Find clips by a sentence: exact cosines with a folder of unit vectors, or text-aware pooling in three looks."""
