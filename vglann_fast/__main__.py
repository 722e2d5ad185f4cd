"""`python -m vglann_fast` is `vglann`."""

import sys

from vglann_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
