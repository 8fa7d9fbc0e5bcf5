"""`python -m minisft` is `minisft`."""

import sys

from minisft.cli import main

sys.exit(main())
