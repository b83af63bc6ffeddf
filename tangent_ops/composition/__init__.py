"""Composition of deltas: weighted sums, least squares, and the ledger of shards."""
