"""Imports point one way: within the library, and from the experiments to its public names."""

import ast
import pathlib

import lorapro_jax as lp

ROOT = pathlib.Path(lp.__file__).parent.parent
ORDER = [
    "_checks", "_paths", "_sharding", "_small", "_moments", "_layouts", "_groups", "_tangent",
    "_pairwise", "_projection", "_retraction", "_descent", "_adam", "_muon", "_partition",
    "_state_sharding", "_diagnostics", "_adapter", "linen", "nnx", "layouts", "_peft_files",
    "_peft_modules", "peft", "__init__",
]  # fmt: skip
MATHS = ("_sharding", "_small", "_moments", "_tangent")


def imports(path):
    """Dotted names that a file imports: a.b for `import a.b` and for `from a import b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_library_imports_upwards_only():
    for path in (ROOT / "lorapro_jax").glob("*.py"):
        for name in imports(path):
            if name.startswith("lorapro_jax."):
                module = name.split(".")[1]
                assert ORDER.index(module) < ORDER.index(path.stem), f"{path.stem} -> {module}"


def test_the_mathematics_knows_neither_trees_nor_optax():
    for module in MATHS:
        for name in imports(ROOT / "lorapro_jax" / f"{module}.py"):
            own = name.startswith(tuple(f"lorapro_jax.{other}." for other in MATHS))
            assert own or not name.startswith(("optax", "flax", "lorapro_jax"))


def test_experiments_use_public_names_only():
    for path in (ROOT / "experiments").rglob("*.py"):
        for name in imports(path):
            assert not name.startswith("lorapro_jax._"), f"{path} imports {name}"
            assert not name.startswith(("tests", "pickle")), path


def test_the_library_never_imports_the_experiments():
    for path in (ROOT / "lorapro_jax").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith(("experiments", "tests"))]


def test_every_public_name_exists_and_is_documented():
    for name in lp.__all__:
        assert getattr(lp, name).__doc__, name
