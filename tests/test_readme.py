"""The README and the pages it leads to say what is there."""

import re
from pathlib import Path

import pytest

import starling
from starling.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_two_bash_blocks_are_plain_commands() -> None:
    found = blocks("bash")
    assert len(found) == 2
    lines = [line for block in found for line in block.splitlines()]
    for line in lines:
        assert re.fullmatch(r"(pip install|starling|python) \S.*", line), line
        assert "git" not in line
    assert found[0].splitlines()[-1] == "starling demo"
    assert found[1].splitlines()[-1] == "python tools/check.py"
    assert (ROOT / "tools/check.py").is_file()


def test_the_parts_stand_in_their_order() -> None:
    parts = (
        "docs/demo.png",
        "```bash\npip install .",
        "The last lines it prints",
        "**before**",
        '```bash\npip install -e ".[dev]"',
        "## Your prompts, your judge",
        "```yaml",
        "## The source",
        "## What the demo model does not show",
    )
    places = [README.index(part) for part in parts]
    assert places == sorted(places)


def test_no_placeholder_is_left() -> None:
    assert "TODO" not in README


def test_the_source_tree_is_the_one_on_disk() -> None:
    tree = next(block for block in blocks("text") if block.startswith("src/starling/\n"))
    listed = re.findall(r"^  (\S+)  +\S.*$", tree, re.MULTILINE)
    assert len(listed) == len(tree.splitlines()) - 1
    package = ROOT / "src/starling"
    folders = {
        f"{path.name}/" for path in package.iterdir() if path.is_dir() and any(path.glob("*.*"))
    }
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert sorted(listed) == sorted(folders - {"__pycache__/"} | files)


def test_the_recipe_is_one_that_runs(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    assert len(text.splitlines()) <= 15
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    recipe = load_recipe(str(path)).recipe
    assert recipe.feedback is not None
    assert sum(candidate.answers for candidate in recipe.feedback.candidates) == 7


def test_the_python_lines_get_an_answer(policy_folder, tmp_path, monkeypatch, capsys) -> None:
    (text,) = blocks("python")
    assert len([line for line in text.splitlines() if line]) <= 3
    stage = tmp_path / "runs" / "demo" / "ppo"
    stage.mkdir(parents=True)
    (stage / "model").symlink_to(policy_folder, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.isascii()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target for target in targets if not target.startswith("https://")]
    missing = [t for t in local if not (page.parent / t.partition("#")[0]).exists()]
    assert not missing


def test_the_tour_names_files_that_exist() -> None:
    tour = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    table = tour.partition("## Which file")[2]
    named = re.findall(r"`([a-z_]+/[a-z_]+\.py)`", table)
    assert named
    assert [name for name in named if not (ROOT / "src/starling" / name).is_file()] == []


def test_the_changelog_has_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[([^\]]+)\]", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == starling.__version__


def test_the_licence_is_apache_2() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
