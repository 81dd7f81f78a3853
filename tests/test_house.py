"""The shape of the source: sizes of files and folders, which way imports point, and how far they reach."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("specdec", "drafter", "eval")
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".inl", ".css", ".js"}
MOST_FILES, MOST_LINES, LONGEST_CHAIN = 12, 320, 6

# From the bottom up: a module may import from its own line and from those above it in this list. The longest name that
# a module is in counts, so that the parts of the engine that drafters use stand below them, and the loop above.
LAYERS = (
    ("specdec.util",),
    ("specdec.kernels",),
    ("specdec.weights",),
    ("specdec.media",),
    ("specdec.cache",),
    ("specdec.model",),
    ("specdec.memory",),
    ("specdec.engine.verify", "specdec.engine.stats"),
    ("specdec.engine.sampling", "specdec.engine.telemetry"),
    ("specdec.drafting",),
    ("specdec.engine",),
    ("specdec.hf",),
    ("specdec.open",),
    ("specdec.load",),
    ("specdec.server",),
    ("specdec",),
    ("specdec.server",),
    ("drafter.settings",),
    ("drafter.config",),
    ("drafter.inference",),
    ("drafter.mtp_drafter",),
    ("drafter.prompts", "drafter.data", "drafter.files"),
    ("drafter.use",),
    ("drafter.train",),
    ("drafter",),
    ("eval.prompts",),
    ("eval.cli",),
    ("eval.live", "eval.synthetic", "eval.use"),
    (
        "eval.kernels",
        "eval.chat",
        "eval.serve",
        "eval.bench",
        "eval.report",
        "eval.train",
        "eval.fuzz",
        "eval.files",
        "eval.gpu",
    ),
    ("eval",),
    ("run",),
)


def modules(root: Path, packages: Iterable[str] = PACKAGES) -> dict[str, Path]:
    """Return the Python files of `packages` and `run.py` by the name that they are imported under."""
    files = [root / "run.py", *(path for package in packages for path in sorted((root / package).rglob("*.py")))]
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Return, for each module, the modules among `files` that it imports: anywhere in it, for types only, or by
    `import_module` of a constant name."""
    return {name: {*_imported(path, files)} - {name} for name, path in files.items()}


def _imported(path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide which way they point"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "import_module":
            names = [word.value for word in node.args if isinstance(word, ast.Constant)]
        for name in names:
            while name and name not in files:
                name = name.rpartition(".")[0]
            if name:
                yield name


def layer_of(module: str) -> int:
    """Return the place of `module` in LAYERS, counted from the bottom."""
    places = {name: place for place, layer in enumerate(LAYERS) for name in layer}
    while module not in places:
        module = module.rpartition(".")[0]
        assert module, "a module that stands in no layer"
    return places[module]


def pointing_up(found: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the imports in `found` of a module in a higher layer, as "module imports module"."""
    return [
        f"{module} imports {other}"
        for module, others in sorted(found.items())
        for other in sorted(others)
        if layer_of(other) > layer_of(module)
    ]


def longest_chain(found: Mapping[str, Iterable[str]], package: str) -> list[str]:
    """Return the longest chain of modules inside `package`, each of which imports the next.

    Raises:
        ValueError: modules import each other in a circle.
    """
    chains: dict[str, list[str]] = {}

    def chain(module: str, above: tuple[str, ...] = ()) -> list[str]:
        if module in above:
            raise ValueError(f"a circle of imports: {' -> '.join((*above[above.index(module) :], module))}")
        if module not in chains:
            inside = (other for other in found[module] if other.startswith(f"{package}."))
            below = (chain(other, (*above, module)) for other in inside)
            chains[module] = [module, *max(below, key=len, default=[])]
        return chains[module]

    return max((chain(module) for module in found if f"{module}.".startswith(f"{package}.")), key=len)


FILES = modules(ROOT)
FOUND = imports(FILES)


def test_no_folder_holds_more_than_a_dozen_source_files() -> None:
    folders = [ROOT / name for name in (*PACKAGES, "tests")]
    sources = (path for folder in folders for path in folder.rglob("*") if path.suffix in SOURCE_SUFFIXES)
    sources = (path for path in sources if "node_modules" not in path.parts)  # clients on Node, installed there
    count = Counter(str(path.parent.relative_to(ROOT)) for path in sources)
    assert [f"{folder}: {files} files" for folder, files in count.items() if files > MOST_FILES] == []


def test_no_file_is_longer_than_one_sitting() -> None:
    files = FILES | modules(ROOT, ("tests",))
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in files.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_imports_point_down() -> None:
    assert pointing_up(FOUND) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_imports_go_in_circles(package: str) -> None:
    assert longest_chain(FOUND, package), "which raises for a circle"


def test_no_chain_of_imports_in_the_drafter_is_long() -> None:
    chain = longest_chain(FOUND, "drafter")
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def test_every_package_says_what_it_is_for() -> None:
    packages = {name: path for name, path in FILES.items() if path.name == "__init__.py"}
    silent = [name for name, path in packages.items() if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert silent == []


# A list, because nothing else tells "Store K and V" from "Stores of K and V", or a verb from "Media".
VERBS = """
    Add Answer Ask Assign Bind Call Capture Carry Check Choose Collect Compare Compile Constrain Copy Count Cut Deal
    Decode Describe Divide Draft Draw Drive Edit Embed Exchange Feed Fill Follow Generate Give Grow Hand Have Hold
    Join Judge Keep Lay Lead Let Lower Make Map Mark Measure Move Name Normalise Note Own Parse Place Plan Point
    Present Print Propose Put Reach Read Refuse Remember Render Report Run Say Scale Score Send Show Store Stream
    Take Tell Train Turn Write
"""


def test_what_a_class_says_of_itself_begins_with_a_verb() -> None:
    """A verb that is not in `VERBS` yet is added there; a noun, an article or a third person ("Holds") is not."""
    wrong = []
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and (said := ast.get_docstring(node)):
                first = said.split()[0]
                if first not in VERBS.split():
                    wrong.append(f"{name}.{node.name}: {first}")
    assert wrong == []


def test_no_test_file_imports_another() -> None:
    files = modules(ROOT, ("tests",))
    for name, others in imports(files).items():
        shared = [other for other in others if other.rpartition(".")[2].startswith("test_")]
        assert shared == [], f"{name} imports a test file; what tests share is in tests/support"


def test_every_folder_of_tests_mirrors_a_package() -> None:
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")} - {Path()}
    homes = [folder for folder in folders if any((ROOT / top / folder).is_dir() for top in ("specdec", "."))]
    assert {*folders} - {*homes} == set()


def documents() -> str:
    """Return all that the project says in Markdown."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))


def test_every_command_that_is_documented_can_be_run() -> None:
    commands = {*re.findall(r"python -m (eval(?:\.[a-z_]+)+)", documents())}
    assert {"eval.exactness", "eval.kernels", "eval.fuzz"} <= commands
    for command in commands:
        path = FILES.get(f"{command}.__main__", FILES.get(command))
        assert path is not None, f"python -m {command}: there is no such module"
        assert '__name__ == "__main__"' in path.read_text(encoding="utf-8"), f"python -m {command} does nothing"


def test_every_source_file_that_is_documented_is_there() -> None:
    named = {*re.findall(r"(?<![\w/.])(?:specdec|drafter|eval|tests)/[\w/.-]*\.\w+", documents())}
    assert "tests/test_house.py" in named
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def made(root: Path, **sources: str) -> dict[str, set[str]]:
    """Return the imports of files that are made of `sources`: drafter__train__loss is drafter/train/loss.py."""
    (root / "run.py").touch()
    for name, source in sources.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return imports(modules(root))


@pytest.mark.parametrize(
    "line",
    [
        "import drafter.train.loss",
        "from drafter.train import loss",
        "from drafter.train.loss import name",
        "def late():\n    from drafter.train.loss import name",
        "importlib.import_module('drafter.train.loss')",
    ],
)
def test_an_import_that_points_up_is_found_however_it_is_written(line: str, tmp_path: Path) -> None:
    found = made(tmp_path, drafter__train__loss="", drafter__data__features=line)
    assert pointing_up(found) == ["drafter.data.features imports drafter.train.loss"]
    assert longest_chain(found, "drafter") == ["drafter.data.features", "drafter.train.loss"]


def test_a_circle_is_found(tmp_path: Path) -> None:
    found = made(tmp_path, drafter__a="import drafter.b", drafter__b="import drafter.c", drafter__c="import drafter.a")
    with pytest.raises(ValueError, match="a circle of imports: drafter"):
        longest_chain(found, "drafter")


def test_parts_of_the_engine_that_drafters_use_stand_below_them() -> None:
    assert layer_of("specdec.drafting.protocol") < layer_of("specdec.engine.engine")
    assert layer_of("specdec.engine.sampling") < layer_of("specdec.drafting.protocol")
