"""The mount: a thin pyfuse3 adapter over the engine."""

from __future__ import annotations

import os
import sys

if __name__ != "stratum.fuse":
    raise ImportError("import this package as stratum.fuse: the folder has one identity")

# The linker takes a symbol from what was loaded globally first: this must come before pyfuse3. See negotiate.c.
_flags = sys.getdlopenflags()
sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
try:
    from stratum.fuse import _negotiate as _negotiate
finally:
    sys.setdlopenflags(_flags)
