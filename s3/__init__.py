"""The S3 face: HTTP, SigV4, XML and S3 semantics over the engine."""

if __name__ != "stratum.s3":
    raise ImportError("import this package as stratum.s3: the folder has one identity")
