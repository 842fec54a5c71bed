"""docs/flags.md from the settings of the scripts: what `--help` says, on one page.

python tests/write_flags.py
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common.cli import RunConfig, flag  # noqa: E402

PAGE = ROOT / "docs" / "flags.md"
JOBS = ("quantumgrav", "student", "ultimate", "vqgan")
HEAD = """\
# Every flag

Made by `python tests/write_flags.py` from the scripts' settings; `--help` says the same. Each flag is also a key of a
`--config` file (`batch_size: 16`). A flag that is on or off is switched by `--flag` and `--no-flag`. No default: unset.
"""


def settings(script: str) -> type:
    return import_module(f"scripts.{script}").Config


def fields_of(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def described(cls: type) -> Iterator[tuple[str, str, str | None]]:
    """(name, heading, docstring) of the fields that a class itself defines; headings are the comments between them."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    body = ast.parse(source).body[0].body
    heading = ""
    before = 0
    for node, after in zip(body, [*body[1:], None], strict=True):
        comments = [line.strip("# ") for line in lines[before : node.lineno - 1] if line.strip().startswith("#")]
        heading = comments[-1] if comments else heading
        before = node.end_lineno
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            yield node.target.id, heading, text


def written(value: object) -> str:
    """A default as one would type it."""
    if value is dataclasses.MISSING:
        return "must be given"
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value))}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def choices(hint: object) -> tuple[str, ...]:
    """Of a Literal, alone or within a tuple or beside None."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((found for part in get_args(hint) if (found := choices(part))), ())


def row(cls: type, name: str, text: str | None) -> str:
    options = choices(get_type_hints(cls)[name])
    shown = f"`{flag(name)}`" + (f" {', '.join(f'`{o}`' for o in options)}" if options else "")
    explained = " ".join((text or "").split()).replace("<", "&lt;").replace("|", "\\|")
    return f"| {shown} | {written(fields_of(cls)[name].default)} | {explained} |"


def table(cls: type) -> Iterator[str]:
    """The flags of a class itself, and what it changes of the shared ones."""
    shared = fields_of(RunConfig) if issubclass(cls, RunConfig) and cls is not RunConfig else {}
    yield "| flag | default | |"
    yield "|---|---|---|"
    above = ""
    for name, heading, text in described(cls):
        if name not in shared:
            if heading != above:
                yield f"| *{heading}* | | |"
            yield row(cls, name, text)
            above = heading
    if shared:
        other = {name: fields_of(cls)[name].default for name in shared}
        other = {name: value for name, value in other.items() if value != shared[name].default}
        yield f"\nOther defaults of shared flags: {given(other)}."
        yield f"\n`--demo` sets {given(cls.DEMO)}."


def given(flags: dict[str, object]) -> str:
    values = {name: " ".join(map(str, v)) if isinstance(v, tuple) else v for name, v in flags.items()}
    return ", ".join(f"`{flag(name)} {value}`" for name, value in values.items())


def page() -> str:
    sections = [HEAD, "## All training scripts\n", *table(RunConfig)]
    for job in JOBS:
        for kind in ("train", "predict"):
            sections += [f"\n## {kind}_{job}.py\n", *table(settings(f"{kind}_{job}"))]
    return "\n".join(sections) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
