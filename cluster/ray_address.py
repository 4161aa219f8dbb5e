"""Check that a Ray cluster answers at RAY_ADDRESS."""

import re

from cluster.errors import KuzushijiError, OptionError, squeezed

SECONDS_FOR_ANSWER = 10.0


def check_address(address: str) -> None:
    """Check that a Ray cluster answers at RAY_ADDRESS. Without one, `ray.init` would print its own log for minutes.

    Raises:
        OptionError: the address has a form that does not work here.
        KuzushijiError: no cluster answers, or it rejects the token.
    """
    import grpc
    from ray._private.gcs_utils import create_gcs_channel
    from ray._private.services import canonicalize_bootstrap_address
    from ray.exceptions import AuthenticationError

    if not re.fullmatch(r"auto|[^/:\s][^/\s]*:\d+", address):  # with ray:// Ray Data does not work
        raise OptionError(
            f"RAY_ADDRESS must be HOST:PORT of a head (port 6379 by default), or auto. Received: {address}. "
            "Outside the cluster, unset it, and run `kuzushiji submit -- COMMAND`. See docs/faq.md"
        )
    try:
        with create_gcs_channel(canonicalize_bootstrap_address(address)) as channel:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=SECONDS_FOR_ANSWER)
    except (OSError, grpc.RpcError, AuthenticationError) as error:  # OSError: `auto` without a Ray
        code, text = (error.code(), error.details()) if isinstance(error, grpc.RpcError) else (None, str(error))
        mend = "Start it, correct RAY_ADDRESS, or unset it to use this machine alone"
        if code == grpc.StatusCode.UNAUTHENTICATED or isinstance(error, AuthenticationError):
            if address == "auto":  # `ray.init` then looks for a token by itself
                return
            mend = "Put the cluster's token into ~/.ray/auth_token (mode 600) and set RAY_AUTH_MODE=token"
        received = squeezed(text or str(code), 300)
        raise KuzushijiError(
            f"a Ray cluster must answer at RAY_ADDRESS. Received: {address}: {received}. {mend}. See docs/faq.md"
        ) from error
