"""Remote stores behind one contract. Empty until the cold tier is built."""

if __name__ != "stratum.cold_backends":
    raise ImportError("import this package as stratum.cold_backends: the folder has one identity")
