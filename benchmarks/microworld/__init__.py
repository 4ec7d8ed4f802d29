"""The micro world: a small Cosmos 3 checkpoint that learned a world, the scripts that make it, and its checks."""
