"""What ``python -m oobpickle`` runs.

**What.** The command line; see `_cli.main`.

**How it works.** It is also imported by processes that a command spawns, and does nothing there.

**Lifetime.** The process ends with the command's exit code.

**When it cannot.** See `_cli.main`.
"""

import sys

from oobpickle._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
