"""Shows the sections of our docstrings (Guarantee, Args, Returns, ...) as Markdown: an extension of griffe."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

LABEL = re.compile(r"^(Guarantee|Args|Returns|Raises|Source)(:| (?=tested|assumed|proved))(.*)$")
LABEL_IN_STARS = re.compile(r"^\*Guarantee\* ")
ENTRY = re.compile(r"^    ([\w`][\w`, .*]*?):( .*)?$")


class DocstringSections(Extension):
    """Puts each section into a paragraph of its own, and each entry of it into a list."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The docstring with bold section names and listed entries; `[a][b]` stays what it is."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        line = LABEL_IN_STARS.sub("Guarantee: ", line)
        found = LABEL.match(line)
        if found:
            lines += ["", f"**{found[1]}**{found[3]}"]
            inside = True
        elif inside and (entry := ENTRY.match(line)):
            names = entry[1] if "`" in entry[1] else f"`{entry[1]}`"
            bullet = f"- {names}:{entry[2] or ''}"
            lines += ["", bullet] if not lines[-1].startswith("- ") else [bullet]
        elif inside and line.startswith("    "):
            lines.append("  " + line.strip())
        else:
            inside = inside and bool(line.strip())
            lines.append(line)
    return "\n".join(lines).replace("][", "]\\[")
