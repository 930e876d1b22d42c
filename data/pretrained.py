"""Networks of diffusers and transformers, and data sets, from a folder or from the Hugging Face hub."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from runtime.errors import UserError
from runtime.files import check_regular


def attempt(option, name, what, way_out, read, library, cached=None):
    """read(library), with every error as one line: "{option} {name}: no usable {what} in that folder (...); {way_out}".
    cached: whether all of a hub name was downloaded before (default: its config.json was)."""
    try:
        for path in Path(name).glob("*.*"):  # what the library might open
            check_regular(path)
        if not os.path.isdir(name):
            check_network(name, cached)
        return read(library)
    except UserError:
        raise
    except Exception as error:  # the library, the hub's client and its HTTP library each raise their own kinds
        where = "in that folder" if os.path.isdir(name) else "there, and no local folder of that name"
        reason = str(error).strip().removeprefix("--").split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{option} {name}", f"no usable {what} {where} ({reason})", way_out) from None


def check_network(name, cached=None):
    """Raises OSError where a hub name was not downloaded and no hub is reached; its client would try for half a minute."""
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(name, "config.json"), str) if cached is None else cached
    proxy = any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    if cached or proxy or constants.HF_HUB_OFFLINE:
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), timeout=5).close()
    except OSError:
        raise OSError(f"no network: {hub.hostname} cannot be reached") from None
