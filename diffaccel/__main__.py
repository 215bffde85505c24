"""``python -m diffaccel`` and ``accelerate launch -m diffaccel``."""

import sys

from diffaccel.cli import main

if __name__ == "__main__":
    sys.exit(main())
