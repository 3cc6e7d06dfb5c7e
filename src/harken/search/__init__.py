"""Find clips by a sentence: a folder of unit vectors and exact cosine search over it."""
