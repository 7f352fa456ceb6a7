"""How the site is made from the documents of the project. To build it, in a clone:

    python -m sphinx -W -n --keep-going -c docs . build/site

The source directory is the project, so that links between all of its documents lead somewhere, and
are checked. A page that is added to a folder of docs/ is found without a change here.
"""

import shutil
from pathlib import Path

import oobpickle

HERE = Path(__file__).parent

project = "oobpickle"
author = "the oobpickle developers"
copyright = author
release = version = oobpickle.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "examples/README.md",
]
exclude_patterns = [".*", "build", "dist", "docs/_*", "src", "tests*", "**/__pycache__"]
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
templates_path = [str(HERE / "_templates")]
nitpicky = True

myst_heading_anchors = 4

# The pages of the API are made anew, from the names that are public now.
shutil.rmtree(HERE / "reference" / "python", ignore_errors=True)
autosummary_generate = True
autosummary_ignore_module_all = False
autosummary_imported_members = True
autodoc_typehints = "none"
default_role = "autolink"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "pydata_sphinx_theme"
html_title = "oobpickle"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_extra"]
html_show_sourcelink = False
html_copy_source = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "show_toc_level": 2,
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}

# Links to other sites are looked at by a command of its own: python -m sphinx -b linkcheck ...
linkcheck_timeout = 20
linkcheck_retries = 2
