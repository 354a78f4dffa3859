"""Shard groups: processes that hold a model and run sessions inside its forward pass."""
