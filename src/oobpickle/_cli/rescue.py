"""The doctor of a package that cannot be imported.

**What.** Importing this runs ``oobpickle doctor`` and ends the process, if the package is broken.

**How it works.** ``python -m oobpickle doctor`` imports the package before anything of the command
line runs. So ``__init__`` imports this first, if that is the command.

**Lifetime.** No state.

**When it cannot.** If the package can be imported nothing happens here.
"""

import sys

try:
    from oobpickle import _api  # noqa: F401  to see whether it can be imported
except Exception:
    from oobpickle._cli.doctor import doctor

    sys.exit(doctor(as_json="--json" in sys.argv))
