"""The tiers: shards, remotes, the mover, policy, healing, and what users see of them."""
