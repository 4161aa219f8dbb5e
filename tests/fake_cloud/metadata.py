"""The metadata server: a machine asks it about itself, and gets the tokens of its own account from it."""

import json
from typing import Any

from fake_cloud.answers import Refusal
from fake_cloud.identity import Identity
from fake_cloud.machines import Instance

BASE = "/computeMetadata/v1/"


def _not_found(path: str) -> Refusal:
    return Refusal(404, f"The requested URL {path} was not found on this server.", "notFound")


def _tree(instance: Instance, project: str) -> dict[str, Any]:
    """Return the supported part of Google's metadata: folders as dictionaries, values as texts."""
    accounts = {}
    if account := instance.account:
        scopes = "".join(f"{scope}\n" for scope in account.get("scopes", []))
        entry = {"aliases": "default", "email": account["email"], "scopes": scopes, "token": ""}
        accounts = {"default": entry, account["email"]: entry}
    return {
        "instance": {"preempted": "TRUE" if instance.preempted else "FALSE", "service-accounts": accounts},
        "project": {"project-id": project},
        "universe": {"universe-domain": "googleapis.com"},
    }


class Metadata:
    """The server's answers."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def answer(self, asker: Instance | None, path: str, query: dict[str, str], flavor: str | None) -> str:
        """Return the text for a path. It is JSON if it begins with {.

        Raises:
            Refusal: there is no such path, the header is missing, or the caller is not an instance.
        """
        if asker is None:
            raise _not_found(path)
        if flavor != "Google":
            raise Refusal(403, "Missing Metadata-Flavor:Google header.", "forbidden")
        if path == "/":
            return "computeMetadata/\n"
        if not path.startswith(BASE):
            raise _not_found(path)
        parts = [part for part in path.removeprefix(BASE).split("/") if part]
        here = self._walk(asker, parts)
        if parts[:2] == ["instance", "service-accounts"] and parts[3:] == ["token"] and asker.account:
            return json.dumps(self._identity.token(asker.account["email"], asker.account.get("scopes", [])))
        if isinstance(here, str):
            return here
        if query.get("recursive") == "true":
            return json.dumps(_account_form(here) if "aliases" in here else here)
        return "".join(f"{name}/\n" if isinstance(inner, dict) else f"{name}\n" for name, inner in here.items())

    def _walk(self, asker: Instance, parts: list[str]) -> Any:
        here: Any = _tree(asker, self._identity.project)
        for part in parts:
            if not isinstance(here, dict) or part not in here:
                raise _not_found(BASE + "/".join(parts))
            here = here[part]
        return here


def _account_form(account: dict[str, str]) -> dict[str, Any]:
    """Return an account in the form of `recursive=true`."""
    return {"aliases": [account["aliases"]], "email": account["email"], "scopes": account["scopes"].split()}
