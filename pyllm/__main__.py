"""`python -m pyllm`: the command line."""

import sys

from pyllm.cli import main

sys.exit(main())
