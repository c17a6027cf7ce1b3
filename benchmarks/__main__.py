"""Entry point of `python -m benchmarks`."""

import sys
from pathlib import Path

# `-m` puts the checkout first on the path, where conv_ops may be source without libraries. What is
# measured is the installed package and, only where there is none, a build inside the checkout.
if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent.parent:
    sys.path.append(sys.path.pop(0))

from benchmarks.cli import main

sys.exit(main(sys.argv[1:]))
