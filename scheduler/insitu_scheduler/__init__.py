"""The scheduler: admits sessions, orders them, and has shard groups run them."""
