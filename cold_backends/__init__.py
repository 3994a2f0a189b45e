"""Remotes of the cold tier: one contract, an S3 and a directory implementation, and decorators that add one thing each."""
