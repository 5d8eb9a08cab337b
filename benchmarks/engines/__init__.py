"""Sharded runs: how they end after a fault, and what a save and a rollback cost by the number of ranks."""
