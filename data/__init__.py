"""From videos to latent shards to batches, and the built-in world."""
