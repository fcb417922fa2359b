import sys

from deftcore.cli.main import main

sys.exit(main())
