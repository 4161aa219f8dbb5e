"""Access control: the fake's service accounts, tokens and roles, with Google's endpoints for them."""

import json
import re
import secrets
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import jwt
from google.auth.exceptions import GoogleAuthError

from fake_cloud.answers import Refusal, forbidden, not_implemented

TOKEN_ADDRESS = "https://oauth2.googleapis.com/token"  # noqa: S105
SCOPE = "https://www.googleapis.com/auth/"
ALL = SCOPE + "cloud-platform"
SCOPES = {
    "compute": {ALL, SCOPE + "compute"},
    "storage": {ALL, SCOPE + "devstorage.full_control", SCOPE + "devstorage.read_write"},
    "project": {ALL},
}
# What each role allows, in coarse rights that suffice for the fake. Any other role allows nothing.
RIGHTS = {
    "roles/owner": {"instances", "accounts", "use accounts", "policy", "buckets", "objects"},
    "roles/compute.admin": {"instances"},
    "roles/compute.instanceAdmin.v1": {"instances"},
    "roles/iam.serviceAccountUser": {"use accounts"},
    "roles/storage.objectAdmin": {"objects"},
}


@dataclass(frozen=True)
class Caller:
    """The account of a request's token, and the token's scopes."""

    email: str
    scopes: frozenset[str]


class Identity:
    """The accounts of one project, their rights, and their tokens."""

    def __init__(self, project: str) -> None:
        self.project = project
        self._lock = threading.RLock()
        self._accounts: dict[str, dict[str, Any]] = {}
        self._policy: dict[str, Any] = {"version": 1, "etag": secrets.token_hex(4), "bindings": []}
        self._keys: dict[str, tuple[str, bytes]] = {}  # key id: account, public key
        self._tokens: dict[str, Caller] = {}
        self._granted: set[tuple[str, str, str]] = set()  # account, "objects" or "use accounts", bucket or account

    def add_account(self, email: str, *roles: str) -> None:
        """Create a service account with roles in the whole project.

        Raises:
            KeyError: a role is not in RIGHTS.
        """
        with self._lock:
            resource = f"projects/{self.project}/serviceAccounts/{email}"
            self._accounts[email] = {"name": resource, "projectId": self.project, "email": email}
            for role in roles:
                RIGHTS[role]
                self._policy["bindings"].append({"role": role, "members": [f"serviceAccount:{email}"]})

    def grant(self, email: str, right: str, resource: str) -> None:
        """Grant a right. right: "objects" of a bucket, or "use accounts" for one account."""
        self._granted.add((email, right, resource))

    def knows(self, email: str) -> bool:
        return email in self._accounts

    def key(self, email: str) -> str:
        """Create a key of the account. Return it as the JSON file that users download."""
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        plain = serialization.NoEncryption()
        pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        public = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        key_id = secrets.token_hex(20)
        self._keys[key_id] = email, public
        file = {"type": "service_account", "project_id": self.project, "private_key_id": key_id, "client_id": "1"}
        file |= {"private_key": pem.decode(), "client_email": email, "token_uri": TOKEN_ADDRESS}
        return json.dumps(file | {"universe_domain": "googleapis.com"})

    def token(self, email: str, scopes: list[str]) -> dict[str, Any]:
        token = "ya29." + secrets.token_urlsafe(24)
        self._tokens[token] = Caller(email, frozenset(scopes))
        return {"access_token": token, "expires_in": 3600, "token_type": "Bearer"}

    def exchange(self, body: bytes) -> dict[str, Any]:
        """Exchange a statement signed with an account's key for a token (the token endpoint)."""
        form = parse_qs(body.decode())
        try:
            keys = {key_id: public for key_id, (_, public) in self._keys.items()}
            claims = jwt.decode(form["assertion"][0], certs=keys, audience=TOKEN_ADDRESS)
        except (GoogleAuthError, ValueError, KeyError) as error:
            raise Refusal(400, f"Invalid JWT: {error}", "invalid_grant") from error
        return self.token(claims["iss"], claims.get("scope", "").split())

    def caller(self, authorization: str | None, service: str) -> Caller:
        """Return the caller that a token belongs to.

        Raises:
            Refusal: the token is missing or unknown, or lacks the scopes for the service.
        """
        kind, _, token = (authorization or "").partition(" ")
        if kind != "Bearer":
            raise Refusal(401, "Request is missing required authentication credential.", "required")
        caller = self._tokens.get(token)
        if caller is None:
            raise Refusal(401, "Invalid Credentials", "authError")
        if not caller.scopes & SCOPES[service]:
            raise Refusal(403, "Request had insufficient authentication scopes.", "insufficientPermissions")
        return caller

    def may(self, email: str, right: str, resource: str | None = None) -> bool:
        """Return whether an account has a right, by a role in the project or by a grant for the resource."""
        return (email, right, resource) in self._granted or any(right in RIGHTS.get(r, ()) for r in self._roles(email))

    def _roles(self, email: str) -> set[str]:
        member = f"serviceAccount:{email}"
        with self._lock:
            return {binding["role"] for binding in self._policy["bindings"] if member in binding["members"]}

    def _require(self, caller: Caller, right: str) -> None:
        if not self.may(caller.email, right):
            raise forbidden("The caller does not have permission")

    def projects(self, method: str, path: str, body: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """Answer as the resource manager. As with Google, a missing project looks like one of somebody else."""
        if (method, path) == ("POST", "/v1/projects"):
            raise forbidden("Service accounts cannot create projects without a parent.")
        found = re.fullmatch(r"/v1/projects/([^/:]+)(:\w+)?", path)
        match (method, found and found[2]):
            case _ if not found:
                raise not_implemented(f"{method} {path}")
            case _ if found[1] != self.project or not self._roles(caller.email):
                raise forbidden("The caller does not have permission")
            case "GET", None:
                return {"projectId": self.project, "lifecycleState": "ACTIVE"}
            case "POST", ":getIamPolicy":
                self._require(caller, "policy")
                return json.loads(json.dumps(self._policy))
            case "POST", ":setIamPolicy":
                self._require(caller, "policy")
                return self._set_policy(body["policy"])
        raise not_implemented(f"{method} {path}")

    def _set_policy(self, policy: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            if policy.get("etag", self._policy["etag"]) != self._policy["etag"]:
                raise Refusal(
                    409, "There were concurrent policy changes. Please retry the whole read-modify-write.", "aborted"
                )
            self._policy = {**policy, "etag": secrets.token_hex(4)}
            return self._policy

    def service_accounts(self, method: str, path: str, body: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """Answer as IAM's API of service accounts: get one, create one."""
        found = re.fullmatch(r"/v1/projects/([^/]+)/serviceAccounts(?:/([^/]+))?", path)
        if not found or (method, bool(found[2])) not in (("GET", True), ("POST", False)):
            raise not_implemented(f"{method} {path}")
        if found[1] not in (self.project, "-"):
            raise forbidden("The caller does not have permission")
        self._require(caller, "accounts")
        if method == "POST":
            email = f"{body['accountId']}@{self.project}.iam.gserviceaccount.com"
            self.add_account(email)
            return self._accounts[email]
        if not self.knows(found[2]):
            raise Refusal(404, f"Unknown service account: {found[2]}", "notFound")
        return self._accounts[found[2]]
