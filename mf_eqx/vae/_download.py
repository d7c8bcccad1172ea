"""Download of a tokenizer, the only function of this part that uses the internet."""

from pathlib import Path

from .._optional import optional
from ._layout import WEIGHTS

# On the main branch of sd-vae-ft-mse. A commit is used because the content of a branch can change.
_COMMIT = "31f26fdeee1355a5c34592e401dd41e45d25a493"


def download_autoencoder(repository: str = "stabilityai/sd-vae-ft-mse", revision: str = _COMMIT) -> Path:
    """Download a tokenizer (335 MB) from the Hugging Face hub into its cache, once. Requires the extra `hub`.

    **Arguments:** `repository` with the weights at its top level or in `vae/`; `revision` a commit, tag or branch of
    the repository. The default is a commit of the default repository; it must be given for any other repository.

    **Returns:** the local folder, for `load_autoencoder`.

    **Raises:** the errors of huggingface_hub, for example if the repository does not exist.
    """
    with optional("huggingface_hub"):
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    wanted = [f"{folder}{name}" for folder in ("", "vae/") for name in ("config.json", WEIGHTS)]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
