"""docs/deck.md: every key of a deck, from the configuration itself."""

from __future__ import annotations

from hpcsync import config as configs
from hpcsync import schema
from hpcsync.wording import toml

_HEAD = """\
# The deck

<!-- Made by `python tools/write_docs.py` from hpcsync/sections.py: do not edit. -->

A deck is a TOML file with what differs from the defaults below. `extends = "other.toml"` takes
another deck's values first; its path is relative to the file that names it. On the command line a
key is written `section.key=value`, and counts more than the deck:

```sh
python -m hpcsync.train laptop train.steps=20 --dry-run
```

| asked | answer |
|---|---|
| `python -m hpcsync.train --explain train.lr` | what a key means, its default, what it takes |
| `python -m hpcsync.train --explain comm` | all keys of a section |
| `RUN/config.toml` | every key with the value that a run had |

Decks that come with hpcsync, by name: `default`, `laptop`, `digits`, `cpu_cluster`, `gpu_cluster`
(in `inputs/`). Misspelt keys, wrong types, values out of range and batches that do not divide are
told all at once, with file and line.

Sections: {sections}.
"""


def page() -> str:
    """The text of docs/deck.md."""
    sections = list(schema.sections(configs.Config))
    links = ", ".join(f"[{name}](#{name})" for name, _ in sections)
    blocks = [_HEAD.format(sections=links)]
    for name, kind in sections:
        lines = [
            f"## {name}\n",
            f"{kind.__doc__}\n",
            "| key | default | takes | what |",
            "|---|---|---|---|",
        ]
        lines += [_row(key) for key in schema.keys_of(name, kind)]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _row(key: schema.Key) -> str:
    default = toml(key.default).replace("|", "\\|")
    cells = (f"`{key.name}`", f"`{default}`", key.accepts(), key.help)
    return "| " + " | ".join(cell.replace("\n", " ") for cell in cells) + " |"
