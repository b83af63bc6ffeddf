"""Where a timm model's published weights would come from: this machine, or the network."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

TIMEOUT = 1.2  # seconds of a probe; there are two
_TRIES = 2
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class WeightsSource:
    """Where a model's weights come from.

    Attributes:
        kind: "cache", a file on this machine; "hub", they can be downloaded; "none" if they cannot
            be had.
        file: of kind "cache".
        why: of kind "none", in words.
    """

    kind: str
    file: Path | None = None
    why: str = ""


def weights_source(model: str) -> WeightsSource:
    """Find where timm's weights of a model would come from; nothing is downloaded.

    Takes at most `TIMEOUT` for each of two probes, and none if they are in a cache of Hugging
    Face's or torch's hub, or if HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set.

    Args:
        model: timm's name, with or without a tag.
    """
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(model)
    if config is None or not config.has_weights:
        return WeightsSource("none", why=f"timm publishes no weights of {model}")
    if (file := _cached(config)) is not None:
        return WeightsSource("cache", file)
    if set_by := next((name for name in _OFFLINE if _is_set(name)), None):
        return WeightsSource("none", why=f"{set_by} is set, and they are not in the local cache")
    place = _address(config)
    if (why := unreachable(place)) is not None:
        return WeightsSource("none", why=f"{urlparse(place).netloc} cannot be used ({why})")
    return WeightsSource("hub")


def unreachable(address: str) -> str | None:
    """Why a file cannot be had, after one more try; None if its server answers that it can."""
    why: str | None = None
    for _ in range(_TRIES):
        answer: list[str | None] = []
        # A thread, because looking up a name has no timeout.
        probe = threading.Thread(target=lambda found=answer: found.append(_asked(address)))
        probe.daemon = True
        probe.start()
        probe.join(TIMEOUT)
        why = answer[0] if answer else f"no answer within {TIMEOUT} s"
        if why is None:
            return None
    return why


def _asked(address: str) -> str | None:
    request = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT):
            return None
    except urllib.error.HTTPError as error:
        with error:  # Hugging Face's hub marks its own errors; gateways answer in its place
            known = error.headers.get("X-Error-Code") == "EntryNotFound"
        return None if error.code < 400 or known else f"it answers {error.code}"
    except urllib.error.URLError as error:
        return _reason(error.reason)
    except OSError as error:
        return _reason(error)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection is an answer."""

    def redirect_request(self, *_: object) -> None:
        return None


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT} s"
    return str(getattr(error, "strerror", None) or error)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def _address(config: object) -> str:
    if repository := getattr(config, "hf_hub_id", None):
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"{host}/{repository.partition('@')[0]}/resolve/main/config.json"
    return str(getattr(config, "url", ""))


def _cached(config: object) -> Path | None:
    """The weights' file, if timm needs no network to load it."""
    if repository := getattr(config, "hf_hub_id", None):
        from huggingface_hub import try_to_load_from_cache

        name, _, revision = repository.partition("@")
        given = getattr(config, "hf_hub_filename", None)
        for file in [given] if given else ["model.safetensors", "pytorch_model.bin"]:
            found = try_to_load_from_cache(name, file, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    elif url := getattr(config, "url", None):
        from torch.hub import get_dir

        found = Path(get_dir()) / "checkpoints" / os.path.basename(urlparse(url).path)
        if found.is_file():
            return found
    return None
