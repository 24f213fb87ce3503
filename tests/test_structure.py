"""The house rules that no linter knows: layers, names, packaging, and what is imported when."""

import ast
import configparser
import doctest
import fnmatch
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("models", "recipes", "export", "benchmarks")
#: Imports go to the left only.
LAYERS = (*FOLDERS, "face")
FACE = ROOT / "src" / "litezoo"
#: Packages of setup.cfg's extras: what only some installations have.
OPTIONAL = {
    "cuda",
    "ncnn",
    "nncf",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnxsim",
    "openvino",
    "packaging",
    "plotly",
    "pnnx",
    "psutil",
    "pynvml",
    "pytorch_lightning",
    "sklearn",
    "tensorboard",
    "tensorrt",
    "torchmetrics",
    "webdataset",
}


def sources():
    """Every Python file of the package with its layer."""
    found = [(file, "face") for file in sorted(FACE.glob("*.py"))]
    for folder in FOLDERS:
        found += [(file, folder) for file in sorted((ROOT / folder).rglob("*.py"))]
    return found


def imports(file):
    """Yield (dotted name, level, line) of every import, the late and the typing ones too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                yield f"{module}.{alias.name}".strip("."), node.level, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value, 0, node.lineno


every_file = pytest.mark.parametrize(
    ("file", "layer"), [pytest.param(f, k, id=str(f.relative_to(ROOT))) for f, k in sources()]
)


# ----------------------------------------------------------------------- layers


def violations(file, layer):
    """Return what breaks the rules of imports in one file, in words."""
    broken = []
    for name, level, line in imports(file):
        top, _, rest = name.partition(".")
        where = f"line {line}: {'.' * level}{name}"
        if level > 1:
            broken.append(f"{where}: relative only inside a folder, litezoo. across folders")
        elif level == 1 and layer != "face" and not (file.parent / f"{top}.py").exists():
            broken.append(f"{where}: there is no {top}.py in {layer}/")
        elif level == 0 and top in FOLDERS:
            broken.append(f"{where}: {top} is called litezoo.{top}")
        elif level == 0 and top == "litezoo":
            target = rest.split(".")[0]
            target = target if target in FOLDERS else "face"
            if target == layer != "face":
                broken.append(f"{where}: relative inside a folder")
            elif LAYERS.index(target) > LAYERS.index(layer):
                broken.append(f"{where}: {layer} must not know {target} ({' <- '.join(LAYERS)})")
    return broken


@every_file
def test_imports_follow_the_layers(file, layer):
    assert violations(file, layer) == []


@pytest.mark.parametrize(
    ("layer", "line", "why"),
    [
        ("models", "from litezoo.recipes.devices import Device", "models must not know recipes"),
        ("recipes", "from litezoo import create_model", "recipes must not know face"),
        ("recipes", "import litezoo.benchmarks.measure", "recipes must not know benchmarks"),
        ("export", "def f():\n    from litezoo.benchmarks import pick", "must not know benchmarks"),
        ("export", "importlib.import_module('litezoo.benchmarks')", "must not know benchmarks"),
        ("models", "from models.fuse import fuse", "models is called litezoo.models"),
        ("models", "import recipes", "recipes is called litezoo.recipes"),
        ("models", "from litezoo.models.fuse import fuse", "relative inside a folder"),
        ("export", "from ..models.fuse import fuse", "litezoo. across folders"),
        ("models", "from .nowhere import x", "there is no nowhere.py in models/"),
    ],
)
def test_the_layer_test_sees_a_violation(tmp_path, layer, line, why):
    file = tmp_path / "made_up.py"
    file.write_text(line)
    assert len(violations(file, layer)) == 1 and why in violations(file, layer)[0]


def test_the_layer_test_lets_what_is_allowed_pass(tmp_path):
    (tmp_path / "errors.py").touch()
    (tmp_path / "made_up.py").write_text(
        "from .errors import UsageError\nfrom . import errors\nimport torch\n"
        "from litezoo.models.fuse import fuse\nimport onnx.checker\n"
    )
    assert violations(tmp_path / "made_up.py", "export") == []


def is_a_dependency(name):
    """Tell whether a file of this name would hide an installed or a known package."""
    requirements = {
        word.partition("[")[0].replace("-", "_") for word in names_of_requirements(setup_cfg())
    }
    return name in OPTIONAL | requirements | set(sys.stdlib_module_names) | {"yaml", "PIL", "torch"}


@every_file
def test_no_file_is_named_after_a_dependency(file, layer):
    """A script run inside its folder would import the file in place of the package."""
    assert not is_a_dependency(file.stem), f"{file.name} hides the package {file.stem}"


@pytest.mark.parametrize("name", ["onnx", "tensorrt", "torch", "timm", "openvino", "profile"])
def test_the_name_test_knows_the_dependencies(name):
    assert is_a_dependency(name)


# ----------------------------------------------------------------------- packaging


def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


def names_of_requirements(parser):
    texts = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    for line in lines("\n".join(texts)):
        name = line
        for separator in "<>=!~; ":
            name = name.partition(separator)[0]
        if not name.startswith("litezoo"):
            yield name


def test_every_package_on_disk_is_in_setup_cfg():
    """What is missing there imports well from a checkout and is absent from the wheel."""
    on_disk = {"litezoo"}
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            on_disk.add(".".join(["litezoo", *file.parent.relative_to(ROOT).parts]))
    options = setup_cfg()["options"]
    assert on_disk == set(lines(options["packages"]))
    places = dict(line.split(" = ") for line in lines(options["package_dir"]))
    assert places.keys() == on_disk
    assert all((ROOT / place / "__init__.py").is_file() for place in places.values())


def test_no_other_folder_at_the_top_is_a_package():
    with_code = {f.parent.name for f in ROOT.glob("[!.]*/__init__.py")}
    assert with_code - {"build", "dist"} == set(FOLDERS)


def test_every_data_file_is_in_the_wheel():
    wanted = setup_cfg()["options.package_data"]
    for folder in FOLDERS:
        patterns = [p.strip() for p in wanted.get(f"litezoo.{folder}", "").split(",")]
        for file in (ROOT / folder).rglob("*"):
            if file.is_dir() or file.suffix in (".py", ".pyc", ".md"):
                continue
            name = file.relative_to(ROOT / folder).as_posix()
            assert any(fnmatch.fnmatch(name, p) for p in patterns), f"{folder}/{name} is left out"


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_face_links_to_the_folders(folder):
    link = FACE / folder
    assert link.is_symlink() and link.readlink() == Path("../..") / folder
    assert link.resolve() == (ROOT / folder).resolve()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_imported_as_a_part_of_litezoo(folder):
    module = importlib.import_module(f"litezoo.{folder}")
    assert Path(module.__file__).resolve() == (ROOT / folder / "__init__.py").resolve()


def test_no_folder_is_imported_under_a_second_name():
    """`models.fuse` and `litezoo.models.fuse` would be two modules with two UsageErrors."""
    for name in list(sys.modules):
        file = getattr(sys.modules[name], "__file__", None) or ""
        ours = name.partition(".")[0] in FOLDERS and file.startswith(str(ROOT))
        assert not ours, f"{name} is imported from {file}"


# ----------------------------------------------------------------------- what is imported when


def imported_by(code):
    """Return the top-level names in `sys.modules` after running `code` in a new interpreter."""
    script = f"import sys\n{code}\nprint(*sorted({{n.partition('.')[0] for n in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_looking_things_up_imports_nothing_heavy():
    code = """
import litezoo, litezoo.models.catalogue as catalogue, litezoo.recipes.devices as devices
assert catalogue.list_models() and catalogue.get_spec("repvgg_a0").weights
assert [devices.get_device(name) for name in devices.list_devices()]
"""
    heavy = {"torch", "torchvision", "timm", "numpy", "huggingface_hub"}
    assert imported_by(code) & (heavy | OPTIONAL - {"packaging"}) == set()


def test_looking_up_a_runtime_does_not_import_its_package():
    code = """
from litezoo.export.runtime import get_runtime, list_runtimes
for name in list_runtimes():
    assert get_runtime(name).name == name
"""
    heavy = {"openvino", "onnxruntime", "tensorrt", "ncnn", "pytorch_lightning"}  # not torch
    assert imported_by(code) & heavy == set()


def test_networks_need_no_optional_package():
    code = """
from litezoo.models.create import create_model
from litezoo.models.fuse import fuse
import torch
with torch.device("meta"):
    fuse(create_model("repvgg_a0"))
"""
    optional = OPTIONAL - {
        "cuda",
        "packaging",
        "psutil",
        "pynvml",
    }  # torch imports these if they are there
    assert imported_by(code) & optional == set()


# ----------------------------------------------------------------------- documentation


def modules():
    """Return the name of every module, over the packages' own paths.

    `litezoo.__path__` is of no use: the editable install's finder lists nothing in it.
    """
    found = [f"litezoo.{file.stem}" for file in FACE.glob("*.py") if file.stem != "__main__"]
    for folder in FOLDERS:
        package = importlib.import_module(f"litezoo.{folder}")
        found += [
            f"litezoo.{folder}.{info.name}" for info in pkgutil.iter_modules(package.__path__)
        ]
    return sorted("litezoo" if name == "litezoo.__init__" else name for name in found)


def test_all_modules_are_found():
    on_disk = {file for file, _ in sources() if file.stem not in ("__init__", "__main__")}
    found = {name for name in modules() if name != "litezoo"}
    assert len(found) == len(on_disk) >= 10
    assert {"litezoo.models.errors", "litezoo.recipes.devices", "litezoo.export.runtime"} <= found


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_are_true(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] in OPTIONAL:
            pytest.skip(f"{name} needs {error.name}")
        raise
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, "see the captured output"


def test_doctests_are_run_where_messages_are_promised():
    finder = doctest.DocTestFinder()
    for name in ("models.errors", "models.catalogue", "recipes.devices", "export.runtime"):
        module = importlib.import_module(f"litezoo.{name}")
        assert any(test.examples for test in finder.find(module)), name
