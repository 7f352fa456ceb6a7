"""A release of joblib with other names inside, where an interpreter has this folder on its path.

``OTHER_NAMES`` lists them as ``module:name``, below ``joblib``; each gets an underscore behind it
when the module is imported.
"""

import importlib.abc
import importlib.machinery
import os
import re
import sys

_names = {}
for _entry in os.environ.get("OTHER_NAMES", "").split():
    _module, _, _name = _entry.partition(":")
    _names.setdefault(f"joblib.{_module}", []).append(_name)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        text = self.get_source(fullname)
        for name in _names[fullname]:
            # Not the method of an object that was just made: `Pickler(file).dump(obj)`.
            text, n_found = re.subn(rf"(?<!\)\.)\b{name}\b", f"{name}_", text)
            assert n_found, (fullname, name)
        return compile(text, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname not in _names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        spec.loader = _Loader(fullname, spec.origin)
        return spec


sys.meta_path.insert(0, _Finder())
