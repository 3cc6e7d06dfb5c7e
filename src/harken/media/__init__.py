"""Clip -> bytes -> arrays: fetching clips (`fetchers`), cutting, decoding and measuring them."""
