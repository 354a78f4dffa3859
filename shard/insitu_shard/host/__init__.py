"""A host: starts and ends the shard groups of more models than memory holds, by order."""
