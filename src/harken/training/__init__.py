"""Batches, the one training loop, its state and its optimisers."""
