"""The only thing here that uses a network."""

from pathlib import Path

from .._optional import optional
from ._load import WEIGHTS

# Of the main branch of sd-vae-ft-mse; a branch could move, a commit cannot.
_COMMIT = "31f26fdeee1355a5c34592e401dd41e45d25a493"


def download_autoencoder(repository: str = "stabilityai/sd-vae-ft-mse", revision: str = _COMMIT) -> Path:
    """Fetch a tokenizer (335 MB) from the Hugging Face hub into its cache, once; needs the extra `hub`.

    **Arguments:** `repository`, with the weights itself or in `vae/`; `revision` a commit, tag or branch of it, by
    default a commit of the default repository: name your own with another one.

    **Returns:** the local folder, for `load_autoencoder`.

    **Raises:** what huggingface_hub raises, such as for a repository that is not there.
    """
    with optional("huggingface_hub", extra="hub"):
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    wanted = [f"{folder}{name}" for folder in ("", "vae/") for name in ("config.json", WEIGHTS)]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
