"""`python -m bioseq` is the command `bioseq`."""

import sys

from bioseq.cli import main

sys.exit(main())
