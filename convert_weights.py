"""`python convert_weights.py SOURCE OUTPUT` in a clone; `videoxl convert SOURCE OUTPUT` where installed."""

import sys

from videoxl.hub.convert import main

if __name__ == "__main__":
    sys.exit(main())
