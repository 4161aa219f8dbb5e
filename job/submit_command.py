"""The command that runs other ones as jobs on a cluster: `submit`."""

import logging
import shlex

import click

from cluster.errors import OptionError
from job.command import Output, command, main

# Commands that can run as jobs on a cluster. The others read or write the local disk.
JOBS = ("prepare", "train", "evaluate", "predict", "report", "export", "verify")

log = logging.getLogger("kuzushiji")


@command
@click.option("--cluster", metavar="FILE", help="Cluster file that `ray up` was given.  [default: ray_cluster.yaml]")
@click.option(
    "--address", metavar="URL", help="Address of a head node, such as http://127.0.0.1:8265, instead of --cluster."
)
@click.option("--insecure", is_flag=True, help="Send the token to --address without encryption.")
@click.option("--working-dir", metavar="DIR", help="Checkout to upload; the job runs its code instead of the image's.")
@click.option("--no-wait", is_flag=True, help="Return as soon as the job is submitted.")
@click.option("--attach", metavar="JOB", help="Follow a job that was submitted before.")
@click.argument("arguments", nargs=-1, metavar="[-- prepare|train|evaluate|predict|... ...]")
def submit(
    cluster: str | None,
    address: str | None,
    insecure: bool,
    working_dir: str | None,
    no_wait: bool,
    attach: str | None,
    arguments: tuple[str, ...],
) -> Output:
    """Run a command as a job on a cluster, and follow its log.

    The exit code is that of the job.
    """
    from cluster.head import Head, connected
    from cluster.places import local_path, plain_option
    from cluster.submit import follow, submit_job

    if cluster and address:
        raise OptionError("only one of --cluster and --address must be given. Received: both")
    if bool(attach) == bool(arguments):
        raise OptionError(
            f"either a command after -- or --attach JOB must be given. Received: {' '.join(arguments) or 'none'}"
        )
    if attach and working_dir:
        raise OptionError("--working-dir must be given with a command after --, whose code it is. Received: --attach")
    if arguments:
        _check_job(arguments, on_other_machine=not address)
    elif attach:
        plain_option(attach, "--attach")
    folder = local_path(working_dir, "--working-dir") if working_dir else None
    if folder and not folder.is_dir():
        raise OptionError(f"--working-dir must be an existing folder. Received: {working_dir}")
    file = None if address else local_path(cluster or "ray_cluster.yaml", "--cluster")
    head = Head(address, file, insecure)
    with connected(head) as client:
        job = attach or submit_job(client, arguments, folder, head)
        log.info("job %s%s", job, "" if attach else f" was submitted: kuzushiji {shlex.join(arguments)}")
        if no_wait:
            return {"job": job}, [head.follow_and_stop_hint(job)]
        code = follow(client, job, head)
    return {"job": job, "exit_code": code}, []


def _check_job(arguments: tuple[str, ...], on_other_machine: bool) -> None:
    """Find usage errors before the job is submitted, not after minutes on a cluster.

    on_other_machine: whether the head shares no folder with this machine. A relative path is refused in any case.

    Raises:
        OptionError: the command can't run as a job.
        click.UsageError: its options are invalid.
    """
    name, *rest = arguments
    if name not in JOBS:
        raise OptionError(f"a job must be one of {', '.join(JOBS)}. Received: {name}")
    command = main.commands[name]
    given = command.make_context(f"kuzushiji {name}", rest).params
    for option in command.params:
        values = given[option.name or ""] if option.metavar in ("PLACE", "FILE", "DIR", "WEIGHTS") else None
        for value in [values] if isinstance(values, str) else values or ():
            if option.metavar == "WEIGHTS" and value in ("none", "imagenet"):
                continue
            protocol, _, path = value.partition("://") if "://" in value else ("file", "", value)
            if protocol in ("file", "local") and (on_other_machine or not path.startswith("/")):
                raise OptionError(
                    f"each place of a job must be an address, such as gs://BUCKET/crops: it runs on another machine. "
                    f"Received: {option.opts[0]} {value}"
                )
