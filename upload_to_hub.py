"""`python upload_to_hub.py FOLDER ORG/NAME` in a clone; `videoxl upload FOLDER ORG/NAME` where installed."""

import sys

from videoxl.hub.upload import main

if __name__ == "__main__":
    sys.exit(main())
