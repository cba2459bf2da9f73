"""Writes the foot of the pages in docs/: where each linked name of code is defined, file and line.

In a page [`pack`] links to the definition of `pack`; the line stands in the foot that this script
keeps. A name is looked for in the page's own script, then common.py, the other scripts, the tests.

    python tests/link_lines.py      # after code has moved; tests/test_docs.py compares
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("stage1_extreme.py", "build_signals.py", "stage2_distill.py", "evaluate.py")
OWN = {"stage1.md": SCRIPTS[0], "stage2.md": SCRIPTS[2]}  # the others are named like their script
FOOT = "\n<!-- Where the names are defined: python tests/link_lines.py -->\n\n"
USED = re.compile(r"\[`([\w.]+)`\](?!\()")


@functools.cache
def definitions(file: str) -> dict[str, int]:
    """{name: line} of a file's functions, classes, their methods (`Args.check`), and constants."""
    lines = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            lines |= {f"{node.name}.{item.name}": item.lineno for item in methods}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            lines |= {x.id: node.lineno for x in targets if isinstance(x, ast.Name)}
    return lines


def files(page: str) -> list[str]:
    """Where the names of a page are looked for, in this order."""
    own = OWN.get(page, page.replace(".md", ".py"))
    tests = [f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_*.py"))]
    return [*([own] if own in SCRIPTS else []), "common.py", *SCRIPTS, *tests]


def with_foot(page: str, text: str) -> str:
    """The page with its foot made anew. Raises KeyError for a name that is defined nowhere."""
    body, found = text.split(FOOT)[0].rstrip("\n") + "\n", []
    for name in dict.fromkeys(USED.findall(body)):
        places = [file for file in files(page) if name in definitions(file)]
        if not places:
            raise KeyError(f"docs/{page}: [`{name}`] is defined nowhere; mend or drop the link")
        found.append(f"[`{name}`]: ../{places[0]}#L{definitions(places[0])[name]}\n")
    return body + (FOOT + "".join(found) if found else "")


def main() -> None:
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text()
        if (new := with_foot(path.name, text)) != text:
            path.write_text(new)
            print(f"docs/{path.name}")


if __name__ == "__main__":
    main()
