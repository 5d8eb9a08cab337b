"""The layouts of sharded checkpoints."""
