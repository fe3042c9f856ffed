"""Configuration of the documentation."""

from __future__ import annotations

import os
from pathlib import Path

from sphinx.application import Sphinx

import tdprobe
from tdprobe import registry

HERE = Path(__file__).parent
# A progress bar is no output: the examples show what they print.
os.environ["TQDM_DISABLE"] = "1"

project = "tdprobe"
author = "tdprobe contributors"
copyright = "tdprobe contributors"
release = version = tdprobe.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "sg_execution_times.rst", "gallery/sg_execution_times.rst"]
myst_enable_extensions = ["colon_fence", "deflist", "substitution"]
# A name that a room passes on from another has two targets, either of which will do.
suppress_warnings = ["ref.python"]
templates_path = ["_templates"]


def estimator_table() -> str:
    """Describe every registered estimator by its Spec."""
    found = [registry.get(name) for name in registry.names()]
    lines = ["| name, class | scores | range | larger means | unchanged under | paper |", "|---|---|---|---|---|---|"]
    for estimator in found:
        spec, path = estimator.spec, f"{estimator.__module__}.{estimator.__qualname__}"
        unchanged = ", ".join(sorted(spec.invariant_to))
        bounds = f"{spec.bounds[0]:g} to {spec.bounds[1]:g}"
        scores = {"pair": "pairs of layers", "layer": "layers"}.get(spec.kind, spec.kind)
        name = f"`{spec.name}` {{py:class}}`~{path}`"
        lines.append(f"| {name} | {scores} | {bounds} | {spec.larger_means} | {unchanged} | {spec.reference} |")
    return "\n".join(lines)


myst_substitutions = {"estimators": estimator_table()}

autosummary_generate = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = "tdprobe"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False, "navbar_persistent": ["search-button"]}
# Pages without pages below them have nothing to list at their left.
html_sidebars = {"index": [], "install": [], "first_steps": []}
html_static_path = ["_static"]
html_css_files = ["width.css"]
html_show_sphinx = False
html_show_sourcelink = False

# The examples are cells that run: their output and figures are made here, each time, without the network.
sphinx_gallery_conf = {
    "examples_dirs": str(HERE.parent / "examples"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_\d+",
    "within_subsection_order": "FileNameSortKey",
    "ignore_pattern": r"^(?!.*plot_\d+).*\.py$",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "capture_repr": ("_repr_html_",),
    "show_signature": False,
    "remove_config_comments": True,
}


def skip_foreign(app: object, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out what a state takes over from TensorClass: hundreds of methods, described by tensordict."""
    module = getattr(getattr(obj, "fget", obj), "__module__", None) or "tdprobe"
    return True if what == "class" and not module.startswith("tdprobe") else None


def setup(app: Sphinx) -> None:
    """Register the handler above."""
    app.connect("autodoc-skip-member", skip_foreign)
