"""The repository as a whole: one list of dependencies, a README whose commands exist, no arrows the wrong way."""

import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from helpers import command_module

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
COMMANDS = "train extract_latents sample sample_ddp evaluate".split()
TOOLS = "likelihood sweep complexity plot convert app".split()


def test_both_lists_of_dependencies_are_equal():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert sorted(next(entry["pip"] for entry in conda if isinstance(entry, dict))) == sorted(project["dependencies"])


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


# Who may import whom, from the ground floor up; commands may import everything but each other and the benchmarks
MAY_IMPORT = {
    "runtime": set(),
    "diffusion": set(),
    "models": {"diffusion"},
    "data": {"runtime", "models", "diffusion"},
    "checkpoint": {"runtime", "data", "models", "diffusion"},
    "download": {"runtime", "checkpoint", "models"},
    "sampling": {"runtime", "data", "download", "checkpoint", "models", "diffusion"},
    "training": {"runtime", "sampling", "data", "checkpoint", "models", "diffusion"},
    "evaluation": {"runtime", "sampling", "data", "checkpoint", "models", "diffusion"},
}


def test_imports_go_one_way():
    ours = {*MAY_IMPORT, *COMMANDS, "tools", "benchmarks", "studies"}
    assert {path.stem for path in ROOT.glob("*.py")} <= ours, "a new file at the root: say here who may import it"
    for name in {*MAY_IMPORT, *COMMANDS, "tools"}:
        allowed = MAY_IMPORT.get(name, set(MAY_IMPORT)) | {name}
        for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py")]:
            wrong = set(imports(path)) & ours - allowed
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}: see docs/design.md, imports go one way"


PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("[a-z]*/README.md")])


def shown_commands():
    """(page, script, words) of every python, torchrun or srun command in the README and the docs."""
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"```\w*\n(.*?)```", text, re.S) + re.findall(r"(?:^    \S.*\n)+", text, re.M):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ").split(" # ")[0]
                found = re.match(r"(?:\S+=\S+ )*(?:python|torchrun|srun)\b.*?(?:\b(\w+)\.py|-m tools\.(\w+))\b(.*)", line)
                if found and (found[1] or found[2]) in [*COMMANDS, *TOOLS]:
                    yield page.name, found[1] or found[2], shlex.split(found[3])


@functools.cache
def options(command):
    """The options that --help shows."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        importlib.import_module(command_module(command)).main(["--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]*", shown.getvalue()))


@pytest.mark.parametrize("command", [*COMMANDS, *TOOLS])
def test_every_command_that_the_docs_show_has_these_options(command):
    used = [(page, words) for page, script, words in shown_commands() if script == command]
    assert used, f"neither the README nor the docs show {command}.py"
    for page, words in used:
        unknown = {word.split("=")[0] for word in words if word.startswith("--")} - options(command)
        assert not unknown, f"{page}: {command}.py has no {unknown}"


# Options of other programs that pages name: Docker, hf, pip, sbatch, srun, torchrun, ruff, TensorBoard; --num-s is refused
OTHERS = set(
    "--account --cpus-per-task --fix --gpus-per-node --gres --ipc --kill-on-bad-exit --local-dir --logdir --max-restarts "
    "--nnodes --no-deps --nodes --nproc_per_node --ntasks-per-node --num-s --open-mode --partition --repo-type "
    "--requeue --resolution --shm-size --signal --signals-to-handle --time".split()
)


def test_options_and_files_that_pages_name_exist():
    """In sentences and tables too, where the test above does not look."""
    code = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py")]
    known = OTHERS.union(*map(options, [*COMMANDS, *TOOLS]))
    for path in (path for folder in ("benchmarks", "studies", "tests") for path in ROOT.glob(f"{folder}/**/*.py")):
        known.update(re.findall(r'"(--[a-z][\w-]*)', path.read_text()))
        known.update(
            "--" + name.replace("_", "-") for name in re.findall(r"^    (\w+): .*option\(", path.read_text(), re.M)
        )
    wrong = []
    for page in PAGES:
        text = re.sub(r"https?://\S+", "", page.read_text())
        modules = re.findall(r"python -m ((?:tools|studies|benchmarks)\.\w+)", text)
        names = {*re.findall(r"(?<![\w./-])[\w/]+\.py\b", text), *(name.replace(".", "/") + ".py" for name in modules)}
        wrong += [f"{page.name}: {name}" for name in names if not any(f"/{file}".endswith(f"/{name}") for file in code)]
        wrong += [f"{page.name}: {name}" for name in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known]
    assert not wrong, "these options and files do not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_that_exist(page):
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / link if link else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        if anchor:
            text = target.read_text()
            titles = [re.sub(r"[^\w -]", "", title.lower()) for title in re.findall(r"^#+ (.*)", text, re.M)]
            known = {*(title.replace(" ", "-") for title in titles), *re.findall(r'<a name="(.*?)">', text)}
            assert anchor in known, f"{page.name} links to {link}#{anchor}, a heading that is not there"


def test_tests_that_the_page_on_reliability_names_exist():
    named = set(re.findall(r"(\w+)::(\w+)", (ROOT / "docs/reliability.md").read_text()))
    there = {(path.stem, name) for path in ROOT.glob("tests/test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}  # fmt: skip
    assert len(named) > 50
    assert not named - there, "docs/reliability.md names tests that do not exist"
