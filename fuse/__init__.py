"""The mount: a thin pyfuse3 adapter over the engine."""

if __name__ != "stratum.fuse":
    raise ImportError("import this package as stratum.fuse: the folder has one identity")
