"""Print docs/cli.md, from the commands themselves: `make docs` writes it, and a test holds it equal."""

import inspect

import click

from job.cli import main

HEAD = """\
# Commands

Made by `make docs`. The sections of the commands are their `--help`.

A PLACE is a path or an address: `/data/pages`, `gs://bucket/pages`, or any address that an installed
[fsspec](https://filesystem-spec.readthedocs.io) file system reads. A FILE may be an address too, except for `sample`
and `submit`; a DIR is a local folder. Only folders and `gs://` have locks, checksums and atomic writes
([what is not promised](guarantees.md#not-promised)).

Each command also takes:

| option | meaning |
|---|---|
| `--json` | Print one JSON object as the last line, for scripts. |
| `--debug` | Show the traceback of a failure. |
| `-h`, `--help` | Show the help and exit. |

Exit codes: 0 success; 1 failure; 2 options that are wrong, or do not fit the files, folders or hosts that they name. A
failure is one line on standard error; `verify` prints a line for each fault on standard output. Progress is a bar on a
terminal, and elsewhere at most one log line every ten seconds. If standard output is a terminal too, `prepare` and
`predict` show Ray Data's own bars, whose rows are groups of pages.

The object of `--json` is `{"error": ...}` if the command fails as a whole. Otherwise it has these fields;
`faults`, and an `exit_code` that is not 0, are failures too:

| command | fields |
|---|---|
| `sample` | `out`, `fonts`; the numbers `pages`, `characters`, `books` |
| `prepare` | `dataset`; `written`, false if the folder was complete; `crops` of each split; \
the numbers `shards`, `losses`, `clipped`, `unlabelled`, `warnings`, `without_ink` |
| `train` | `models`, each with `architecture`, `model`, `metrics`, and `trained`, false if the run was \
finished; `faults`, a line for each that failed |
| `evaluate` | `split`, and the fields of a split in [metrics.json](formats.md#metricsjson) |
| `report` | `report` |
| `pull` | `models`, each with `name`, `run`, `folder`, `new_bytes` |
| `verify` | `place`, `kind`, `faults`; of a folder, also `files`, a number, and `unlisted` |
| `predict` | `out`, `written`, `accuracy`; the numbers `losses`, `clipped`, `warnings`, `without_ink`, \
and those of `counts` in [its manifest](formats.md#manifestjson-of-predictions) |
| `export` | `out`, `files`, `largest_difference`, `accuracy` |
| `submit` | `job`; without `--no-wait`, also `exit_code` |

**Ray.** Without the environment variable `RAY_ADDRESS`, `prepare`, `train` and `predict` start a local Ray and stop it
at the end. With it, they join the Ray at that address: `HOST:PORT` of a head node, or `auto` on a machine of its
cluster. A local Ray writes to `$RAY_TMPDIR/ray`, else to `$TMPDIR/ray` or `/tmp/ray`; that path must be short.

**Shell completion.** For bash, add this line to `~/.bashrc`, with the folder of the checkout for `$PLACE`; for zsh, the
same with `zsh_source` to `~/.zshrc`:

```text
eval "$(_KUZUSHIJI_COMPLETE=bash_source $PLACE/.venv/bin/kuzushiji)"
```
"""
COMMON = {"as_json", "debug"}


def page() -> str:
    """Return the text of docs/cli.md."""
    return "\n".join([HEAD, *(section(name, main.commands[name]) for name in main.list_commands(click.Context(main)))])


def section(name: str, command: click.Command) -> str:
    """Return a command: its usage, its help, a table of its options."""
    context = click.Context(command, info_name=f"kuzushiji {name}")
    lines = [f"## kuzushiji {name}", "", inspect.cleandoc(command.help or ""), ""]
    lines += ["```text", command.get_usage(context).removeprefix("Usage: "), "```", ""]
    records = [
        record
        for parameter in command.params
        if isinstance(parameter, click.Option)
        and parameter.name not in COMMON
        and (record := parameter.get_help_record(context))
    ]
    if records:
        lines += ["| option | meaning |", "|---|---|", *(row(*record) for record in records), ""]
    return "\n".join(lines)


def row(option: str, text: str) -> str:
    """Return a row of the table."""
    # Outside of code, Markdown takes `<image_id>` for HTML.
    cells = (f"`{option}`", " ".join(text.split()).replace("<", r"\<"))
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    click.echo(page(), nl=False)
