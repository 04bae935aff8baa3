"""What the documentation builds from data: results, benchmark tables, the command line and the files of the root."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from html import unescape
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"^<!-- generated: (?P<what>[a-z]+) ?(?P<argument>.*?) -->$", re.MULTILINE)
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
LOG = logging.getLogger("mkdocs.hooks.steepest")
FILES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md", "docs/": ""}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the generated text in the place of each `<!-- generated: WHAT [ARGUMENT] -->` line."""
    makers = {"atlas": atlas, "evidence": evidence, "benchmark": benchmark, "commands": commands, "file": root_file}

    def make(match: re.Match[str]) -> str:
        argument = match["argument"].strip()
        return makers[match["what"]](argument) if argument else makers[match["what"]]()

    return MARK.sub(make, markdown)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Turn formulas into MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    def make(match: re.Match[str]) -> str:
        latex = re.sub(r"\\arg(?![a-z])", r"\\operatorname{arg}", unescape(match["latex"]))
        made = convert(latex, display="block" if match["tag"] == "div" else "inline")
        if unknown := re.search(r"\\[a-zA-Z]+", made):
            LOG.warning("%s: the formula %r uses %s, which is not known", page.file.src_uri, latex, unknown[0])
        return made

    return FORMULA.sub(make, html)


def atlas() -> str:
    """The table of all recorded claims."""
    return import_module("steepest.lab.atlas").markdown()


def evidence(slug: str) -> str:
    """The claims of one study and how they were judged."""
    return import_module("steepest.lab.atlas").evidence_markdown(slug)


def benchmark() -> str:
    """The stored benchmark tables, newest form of each; a table without its CUDA form says so."""
    parts = []
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        parts.append(_benchmark(json.loads(path.read_text())))
        if path.stem.endswith("-cpu") and not path.with_stem(path.stem[:-4] + "-cuda").exists():
            parts.append("On CUDA: not measured.")
    return "\n\n".join(parts) or "No table is stored yet. `make bench` measures and stores it."


def commands() -> str:
    """Each command of `steepest` with its options, as the program itself declares them."""
    import typer

    root = typer.main.get_command(import_module("steepest.lab.cli").app)
    found: Mapping[str, Any] = getattr(root, "commands", {})
    return "\n\n".join(_command(f"steepest {name}", command) for name, command in found.items())


def root_file(name: str) -> str:
    """A Markdown file of the repository's root, its links made relative to the site."""
    text = (ROOT / name).read_text()
    for source, target in FILES.items():
        text = text.replace(f"]({source}", f"]({target}")
    return text


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table. Bars and line ends in the cells are escaped."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help" and not p.hidden]
    usage = " ".join([name, *(_word(a) for a in arguments), *(["[OPTIONS]"] if options else [])])
    parts = [f"## `{name}`", f"```text\n{usage}\n```", re.sub(r"[ \t]+\n", "\n", command.help or "")]
    if arguments:
        rows = [(f"`{_word(a)}`", getattr(a, "help", None)) for a in arguments]
        parts.append(table(["Argument", "Meaning"], rows))
    if options:
        rows = [("`" + ", ".join([*o.opts, *o.secondary_opts]) + "`", o.help, _default(o)) for o in options]
        width = 3 if any(row[2] for row in rows) else 2
        parts.append(table(["Option", "Meaning", "Default"][:width], [row[:width] for row in rows]))
    return "\n\n".join(parts)


def _word(argument: Any) -> str:
    word = argument.metavar or argument.name.upper()
    return word if argument.required else f"[{word}]"


def _default(option: Any) -> str:
    value = option.default
    if isinstance(value, bool):
        return f"`{option.opts[0]}`" if value else ""
    return f"`{value}`" if isinstance(value, str | int | float | Path) and value != "" else ""


def _benchmark(document: Mapping[str, Any]) -> str:
    rows: Sequence[Mapping[str, Any]] = document.get("rows", [])
    header = list(dict.fromkeys(key for row in rows for key in row))
    environment: Mapping[str, Any] = document.get("environment", {})
    parts = [
        f"## {document.get('title', 'Benchmark')}",
        str(document.get("description", "")),
        table(header, [[row.get(key) for key in header] for row in rows]) if rows else "",
        "Measured with " + ", ".join(f"{key} {value}" for key, value in environment.items()) + "."
        if environment
        else "",
        f"Recorded {document['recorded_at']}." if "recorded_at" in document else "",
    ]
    return "\n\n".join(part for part in parts if part)
