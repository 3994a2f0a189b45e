"""Evidence, policy and movement between tiers. Empty until the tiers are built."""

if __name__ != "stratum.tiering":
    raise ImportError("import this package as stratum.tiering: the folder has one identity")
