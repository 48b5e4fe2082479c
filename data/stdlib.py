"""The text that every Python carries: the documentation and the source of its own standard library.

The unit is the module. A checksum of its name decides where it belongs, so the same module is held out on every machine
and in every Python: one in ten for validation, one in ten for test, the rest for training. The text `tiny` of a split
is documentation: a page for each module, made of its docstrings; in a held-out split without those that a training
page has too (inherited ones), for training with the language reference that `help()` shows. `tiny-code` is the source
code. The standard library differs a little from one Python to the next and so do numbers measured on it.
"""

import ast
import functools
import importlib
import sysconfig
import tokenize
import zlib
from pathlib import Path

from data.command import InputError

# Packages that some distributions or versions leave out: nothing is measured on them, training reads their source.
NOT_EVERYWHERE = {"test", "idlelib", "lib2to3", "distutils", "turtledemo", "tkinter", "ensurepip", "_pyrepl"}
# Other people's code, and tables.
NOT_TEXT = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__phello__"}


def split_of(module):
    """train, validation or test: fixed by the module's name alone."""
    return {0: "validation", 1: "test"}.get(zlib.crc32(module.encode()) % 10, "train")


@functools.cache
def modules():
    """{module name: source} of the standard library, sorted by path."""
    return sources(Path(sysconfig.get_paths()["stdlib"]), NOT_TEXT)


def sources(root, left_out):
    """{module name: source} of the Python files below a folder, sorted by path, without some folders."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not left_out & set(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            try:
                with tokenize.open(path) as f:
                    found[".".join(p for p in parts if p != "__init__")] = f.read()
            except (SyntaxError, UnicodeDecodeError, OSError):
                pass  # a test's deliberately broken file or a broken installation: no text to learn from
    return found


def docstrings(source):
    """[(signature, docstring)] of a module's source, in the order of the text; the module's own has no signature."""
    found = []

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                is_class, doc = isinstance(child, ast.ClassDef), ast.get_docstring(child)
                if doc:
                    arguments = ", ".join(map(ast.unparse, child.bases)) if is_class else ast.unparse(child.args)
                    found.append((f"{'class ' if is_class else ''}{prefix}{child.name}({arguments})", doc))
                visit(child, f"{prefix}{child.name}." if is_class else prefix)

    tree = ast.parse(source)
    if ast.get_docstring(tree):
        found.append(("", ast.get_docstring(tree)))
    visit(tree, "")
    return found


@functools.cache
def documentation():
    """{module name: its docstrings} for the modules that every Python has."""
    found = {}
    for name, source in modules().items():
        if name.split(".")[0] not in NOT_EVERYWHERE:
            try:
                found[name] = docstrings(source)
            except (SyntaxError, ValueError):
                pass  # a template
    return found


def page(name, docs):
    """A module's documentation as plain text."""
    entries = [f"{signature}\n    " + doc.replace("\n", "\n    ").replace("    \n", "\n") if signature else doc
               for signature, doc in docs]
    return f"Help on module {name}\n\n" + "\n\n".join(entries) + "\n\n\n"


@functools.cache
def stdlib_text(split):
    """The documentation of a split: "train", "validation" or "test"."""
    docs = documentation()
    if split == "train":
        shared = set()
        try:
            topics = list(importlib.import_module("pydoc_data.topics").topics.values())
        except ImportError:
            topics = []  # some distributions leave the language reference out
    else:
        shared = {doc for name in docs if split_of(name) == "train" for _, doc in docs[name]}
        topics = []
    kept = {name: [(s, doc) for s, doc in docs[name] if doc not in shared] for name in docs if split_of(name) == split}
    text = "".join([page(name, found) for name, found in kept.items() if found] + topics)
    if not text:
        raise InputError("this Python carries no source of its standard library, which is the text `tiny`: "
                         "use another Python (any CPython from 3.10) or give a text file")
    return text


def stdlib_source(split="train"):
    """The source code of a split: "train", "validation" or "test"."""
    return "\n\n".join(code for name, code in modules().items() if split_of(name) == split
                       and (split == "train" or name.split(".")[0] not in NOT_EVERYWHERE))


def package_source():
    """The source code of all packages that are installed: more text for a larger model."""
    return "\n\n".join(sources(Path(sysconfig.get_paths()["purelib"]), set()).values())
