"""Stratum: one volume that is a POSIX filesystem and an S3 endpoint at the same moment."""

__version__ = "0.1.0"
