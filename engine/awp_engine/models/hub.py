"""Weights from the Hugging Face Hub: hf://OWNER/NAME or hf://OWNER/NAME@REVISION, by the package huggingface_hub.

Only model.safetensors is fetched, and config.json beside it where there is one; nothing of a repository is run.
"""

import contextlib
import re
from pathlib import Path

from awp_engine.checkpoint import CheckpointError
from awp_engine.files.run_places import CONFIG_FILE, MODEL_FILE
from awp_engine.files.text import one_line, shortened

SCHEME = "hf://"
WEIGHTS, SETTINGS = MODEL_FILE, CONFIG_FILE
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_address(place: Path | str) -> bool:
    """Whether a text names a repository of the Hub."""
    return isinstance(place, str) and place.startswith(SCHEME)


def fetched(place: Path | str) -> Path:
    """The file of weights that a place names: of a repository of the Hub its copy here, fetched if need be.

    Offline, by HF_HUB_OFFLINE=1 or without a network, what was fetched earlier is used.

    Raises:
        CheckpointError: no such repository, file or network, or huggingface_hub is not installed; in one line.
    """
    if not is_address(place):
        return Path(place)
    address = _ADDRESS.fullmatch(str(place))
    if address is None:
        raise CheckpointError(f"{place}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    try:
        from huggingface_hub import errors, hf_hub_download
        from huggingface_hub.utils import logging
    except ImportError:
        raise CheckpointError(
            f"{place}: needs the package huggingface_hub, which is not installed: pip install huggingface_hub"
        ) from None
    repository, revision = address.groups()
    verbosity = logging.get_verbosity()
    # it tells of every attempt
    logging.set_verbosity_error()
    try:
        path = Path(hf_hub_download(repository, WEIGHTS, revision=revision))
        with contextlib.suppress(errors.EntryNotFoundError, errors.HfHubHTTPError, OSError):
            # weights do without
            hf_hub_download(repository, SETTINGS, revision=path.parent.name)
        return path
    except errors.LocalEntryNotFoundError:
        reason = "was not fetched before, and the Hub cannot be reached: no network, or HF_HUB_OFFLINE is set"
    except errors.RevisionNotFoundError:
        reason = "has no such revision"
    except errors.RepositoryNotFoundError:
        reason = "is not on the Hub, or private: `hf auth login` gives access"
    except errors.EntryNotFoundError:
        reason = f"has no {WEIGHTS}, which alone is read from the Hub"
    except Exception as error:
        # of the network, the server, or its answer
        reason = f"cannot be fetched: {type(error).__name__}: {shortened(one_line(str(error)), 200)}"
    finally:
        logging.set_verbosity(verbosity)
    raise CheckpointError(f"{place}: {reason}")
