"""What both ends of the contract must agree on beyond its schema."""
