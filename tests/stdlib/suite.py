"""Runs one of CPython's own test modules and writes down how each test ended."""

import faulthandler
import json
import sys
import unittest

HANGS_AFTER_S = 1500


class Result(unittest.TextTestResult):
    """Remembers the outcome of each test by its name."""

    outcomes: dict[str, str] = {}  # noqa: RUF012

    def _note(self, test, outcome):
        self.outcomes.setdefault(test.id(), outcome)

    def addSuccess(self, test):
        super().addSuccess(test)
        self._note(test, "passed")

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self._note(test, "skipped")

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self._note(test, "failed")

    def addError(self, test, err):
        super().addError(test, err)
        self._note(test, "failed")

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._note(test, "failed")

    def addExpectedFailure(self, test, err):
        super().addExpectedFailure(test, err)
        self._note(test, "passed")

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self._note(test, "failed")


if __name__ == "__main__":
    report, *names = sys.argv[1:]
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
    tests = unittest.defaultTestLoader.loadTestsFromNames(names)
    unittest.TextTestRunner(verbosity=2, resultclass=Result).run(tests)
    with open(report, "w") as file:
        json.dump(Result.outcomes, file)
