import sys

from deftcore.cli import main

sys.exit(main())
