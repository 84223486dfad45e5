"""Pages and picture under docs/, and the examples in README and recipes, fit the program."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import typer.main

from moe_convert.cli import app
from moe_convert.families import FAMILIES
from moe_convert.families.custom import CUSTOM_FAMILIES
from moe_convert.recipe import gallery
from moe_convert.wrappers import WRAPPERS

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("*.yaml"))]
COMMAND = re.compile(r"(?<![\w/.-])moe-convert ((?:\\\n|[^\n`|])+)")


def script(name: str) -> ModuleType:
    """Import a script of docs/."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_what_the_program_says() -> None:
    generate = script("generate")
    wanted = generate.pages()
    found = {path.name: path.read_text(encoding="utf-8") for path in generate.PAGES.glob("*.md")}
    assert found.keys() == wanted.keys(), "run `python docs/generate.py`"
    stale = [name for name in wanted if found[name] != wanted[name]]
    assert not stale, f"run `python docs/generate.py`: {stale}"


def test_every_option_of_a_command_is_on_its_page() -> None:
    generate = script("generate")
    pages = generate.pages()
    for words, found in generate.commands(typer.main.get_command(app)):
        text = pages["-".join(words) + ".md"]
        for param in found.params:
            for flag in (*param.opts, *param.secondary_opts):
                name = f"`{flag}`" if flag.startswith("-") else f"`{flag.upper()}`"
                assert name in text, (words, flag)


def test_the_picture_is_what_the_script_draws() -> None:
    draw = script("draw")
    text = draw.PICTURE.read_text(encoding="utf-8")
    assert text == draw.picture(), "run `python docs/draw.py`"
    words = " ".join(ElementTree.fromstring(text).itertext())
    assert {"clone", "split", "compose", "router"} <= set(words.split())


def test_links_in_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert "docs/overview.svg" in local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_the_readme_counts_and_names_what_the_tables_have() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{len(FAMILIES)} dense model types" in text
    assert f"{len(FAMILIES)} and {len(WRAPPERS)} vision-language types" in text
    assert f"({', '.join(row.model_type for row in WRAPPERS)}) keep their vision tower" in text
    custom = [name for name in CUSTOM_FAMILIES if name not in FAMILIES]
    assert f"stock home ({', '.join(custom)}) are refused" in text
    for name in gallery():
        assert f"`{name}`" in text


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| command |") : text.index("Sources: ")]
    for words, _ in script("generate").commands(typer.main.get_command(app)):
        assert re.search(rf"`{words[0]} ?", table), words
        assert words[-1] in table, words


def test_every_option_in_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    known = {"--help"}
    for _, found in script("generate").commands(typer.main.get_command(app)):
        known |= {flag for one in found.params for flag in (*one.opts, *one.secondary_opts)}
    spans = re.findall(r"`(--[^`\n]+)`", text)
    used = {flag for span in spans for flag in re.findall(r"(?<!\S)--[a-z-]+", span)}
    assert "--max-ppl-ratio" in used
    assert used <= known


def examples() -> Iterator[tuple[str, str]]:
    """Yield every command that the README and the recipes show, with the file's name."""
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"\\\n#?", " ", text)
        text = re.sub(r"(`moe-convert [^`\n]*)\n([^`\n]*`)", r"\1 \2", text)
        for found in COMMAND.finditer(text):
            yield path.name, found[1].partition(" && ")[0].partition("#")[0].strip(" .,)`")


@pytest.mark.parametrize(("file", "example"), sorted(set(examples())))
def test_examples_use_commands_and_options_that_exist(file: str, example: str) -> None:
    known = dict(script("generate").commands(typer.main.get_command(app)))
    words = shlex.split(example.replace("'", "").replace('"', ""))
    command = next(known[tuple(words[:n])] for n in (1, 2) if tuple(words[:n]) in known)
    flags = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    given = words[: words.index("--")] if "--" in words else words
    used = [word.partition("=")[0] for word in given if re.match(r"-{1,2}[a-z]", word)]
    assert [flag for flag in used if flag not in {*flags, "-h", "--help"}] == [], file
