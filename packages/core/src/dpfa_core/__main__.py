"""``python -m dpfa_core doctor``."""

import sys

from dpfa_core.doctor import main

sys.exit(main(sys.argv[1:]))
