"""What all commands share: one-line failures, `--json`, `--debug`, exit codes."""

import codecs
import functools
import io
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

import click

from cluster.errors import OptionError, one_line, without_secrets
from cluster.progress import log_to_stderr

if TYPE_CHECKING:
    from pydantic import BaseModel

# What a command returns: an object for `--json`, and lines for the terminal.
Output = tuple[dict[str, Any], list[str]]

# The commands in the order in which they are used, as the help lists them.
ORDER = ("sample", "prepare", "train", "evaluate", "report", "pull", "verify", "predict", "export", "submit")


class OneLine(click.Group):
    """A click group that prints usage errors in one line, too."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=ORDER.index)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As in click, except for how errors are printed."""
        for stream in (sys.stdout, sys.stderr):  # a locale's encoding may lack characters that are printed, such as 〱
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            sys.exit(super().main(args, prog_name, complete_var, standalone_mode=False, **extra))
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            text = f"{' '.join(error.format_message().split())} See --help"
            if isinstance(error, click.NoSuchOption) and error.ctx and error.ctx.info_name == "submit":
                text = f"{text}. Options of the job come after --: kuzushiji submit -- prepare ..."
            given = [*(sys.argv[1:] if args is None else args), "--"]
            _echo_error(text, as_json="--json" in given[: given.index("--")])
            sys.exit(error.exit_code)
        except click.Abort:
            click.echo("kuzushiji: stopped", err=True)
            sys.exit(1)


def _echo_error(text: str, as_json: bool) -> None:
    click.echo(f"kuzushiji: {text}", err=True)
    if as_json:
        click.echo(_as_json({"error": text}))


def _as_json(value: dict[str, Any]) -> str:
    """Return JSON that can be printed: outside of UTF-8, with JSON's own escapes."""
    return json.dumps(value, ensure_ascii=codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8")


@click.group(
    cls=OneLine,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Without data, begin with `kuzushiji sample --out pages --num-pages 40`, and give its output to `prepare`: "
    "--pages pages/train_images --labels pages/train.csv. README.md and docs/ explain each step.",
)
@click.version_option(package_name="kuzushiji")
def main() -> None:
    """From scans of old Japanese pages to a trained classifier of their characters.

    A PLACE is a path or an address (/data/pages, gs://bucket/pages). Exit codes: 0 success, 1 failure, 2 options
    that are wrong, or do not fit what they name.
    """


def command(function: Callable[..., Output]) -> click.Command:
    """Register a command. Its result is printed, and its failures in one line.

    The command exits with `exit_code` of the result if it has one, with 1 if the result has `faults`, else with 0.
    """

    @functools.wraps(function)
    def run(as_json: bool, debug: bool, **options: Any) -> None:
        log_to_stderr(debug)
        try:
            _refuse_empty(options)
            result, lines = function(**options)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            if debug:
                click.echo(without_secrets(traceback.format_exc()), err=True, nl=False)
            from cluster.bucket_errors import explained

            error = explained(error) or error
            _echo_error(one_line(error), as_json)
            sys.exit(2 if isinstance(error, OptionError) else 1)
        for line in lines if not as_json else [_as_json(result)]:
            click.echo(line)
        sys.exit(result.get("exit_code", 1 if result.get("faults") else 0))

    registered: click.Command = main.command(run)
    registered.params += [
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object as the last line, for scripts."),
        click.Option(["--debug"], is_flag=True, help="Show the traceback of a failure."),
    ]
    return registered


def _refuse_empty(options: dict[str, Any]) -> None:
    """Raise OptionError for an option with an empty value. Otherwise it would count as not given.

    `train --run "$RUN"` with an unset variable would begin another run after each restart.
    """
    for parameter in click.get_current_context().command.params:
        values = options.get(parameter.name or "")
        if isinstance(parameter, click.Option) and "" in (values if isinstance(values, tuple) else (values,)):
            raise OptionError(f"{parameter.opts[-1]} must have a value. Received: an empty one. Is a variable unset?")


def option(model: "type[BaseModel]", field: str, *names: str, **settings: Any) -> Callable[..., Any]:
    """Return a click option for a field of a config, with the field's name, type, default and help.

    names: names of the option instead of `--field-name`. settings: of `click.option`; they override those of the field.
    """
    info = model.model_fields[field]
    arguments = get_args(info.annotation) or (info.annotation,)  # of `X | None` or a Literal, else the type itself
    types = [getattr(argument, "__origin__", argument) for argument in arguments if argument is not type(None)]
    choices = [choice for choice in types if isinstance(choice, str)]
    has_default = not info.is_required() and info.default is not None and "[default:" not in (info.description or "")
    settings = {
        "type": click.Choice(choices) if choices else types[0],
        "help": info.description,
        "default": info.default if has_default else None,
        "show_default": has_default,
    } | settings
    return click.option(*(names or [f"--{field.replace('_', '-')}"]), **settings)


def config_of(model: Any, **values: Any) -> Any:
    """Return a pydantic config.

    Raises:
        OptionError: a value is invalid; the message names the first one.
    """
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as error:
        raise OptionError.of(error) from error
