"""The site's configuration. `make docs` builds it, without a network; a warning is an error."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "docs/_ext")]

import rlscuda  # noqa: E402

project, author, copyright = "rlscuda", "rlscuda", "rlscuda, Apache-2.0"
version = release = rlscuda.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
    "commands",
    "figures",
    "included",
]
exclude_patterns = ["_build", "_ext", "tutorials"]

html_theme = "furo"
html_title = f"rlscuda {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sphinx = False

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "py:obj"  # `P` links where there is such a thing, and is code elsewhere
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("Array", "ArrayLike", "NDArray", "Values")}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
strip_signature_backslash = True  # keeps the underscore of coef_
python_maximum_signature_line_length = 100

sphinx_gallery_conf = {
    "examples_dirs": ["tutorials"],
    "gallery_dirs": ["auto_tutorials"],
    "filename_pattern": r"\.py$",  # every script is run
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "notebook_extensions": set(),
    "capture_repr": (),
    "reset_modules": ("matplotlib",),
    "remove_config_comments": True,
}
