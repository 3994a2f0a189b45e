"""Ordered key-value transactions: the contract first, then its implementations."""
