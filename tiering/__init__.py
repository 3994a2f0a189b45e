"""Tiering: policy, movement, explanation. The evidence it decides by is collected in stratum/evidence.py."""
