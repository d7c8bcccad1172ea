"""Fetching from the hub, with a stand-in for it: no test uses the network."""

import sys
import types

import pytest
from diffusers_files import write_folder

from mf_eqx import vae
from mf_eqx._optional import MissingDependency


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the hub was asked for; it answers with a folder."""
    found = []

    def snapshot_download(repository, **options):
        found.append((repository, options))
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    return found


def test_the_default_is_a_fixed_commit_of_the_paper_s_tokenizer(asked):
    vae.download_autoencoder()
    ((repository, options),) = asked
    assert repository == "stabilityai/sd-vae-ft-mse"
    assert options["revision"] == "31f26fdeee1355a5c34592e401dd41e45d25a493"


def test_another_repository_and_revision_are_passed_on(asked):
    vae.download_autoencoder("somebody/model", "main")
    assert asked[0][0] == "somebody/model" and asked[0][1]["revision"] == "main"


def test_nothing_pickled_is_fetched(asked):
    vae.download_autoencoder()
    patterns = asked[0][1]["allow_patterns"]
    assert "diffusion_pytorch_model.safetensors" in patterns and "vae/config.json" in patterns
    assert {pattern.rpartition(".")[2] for pattern in patterns} == {"json", "safetensors"}


def test_what_is_fetched_can_be_loaded(asked, tmp_path):
    pytest.importorskip("safetensors")
    size = vae.AutoencoderSize(widths=(2, 4), blocks=1, latent=2, groups=1)
    write_folder(tmp_path, size)
    assert vae.load_autoencoder(vae.download_autoencoder(), size).size == size


def test_the_hub_takes_these_arguments(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    import inspect

    accepted = inspect.signature(huggingface_hub.snapshot_download).parameters
    assert {"repo_id", "revision", "allow_patterns"} <= accepted.keys() and next(iter(accepted)) == "repo_id"


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependency, match=r"pip install 'mf_eqx\[hub\]'"):
        vae.download_autoencoder()
