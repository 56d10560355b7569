"""The settings files that come with the project."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from daskcell.config import Config, load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_settings_file_can_be_read(path):
    load_config(path)


COMPLETE = [path for path in sorted(CONFIGS.glob("*.yaml")) if "every setting" in path.read_text().lower()]


def test_the_default_file_claims_to_be_complete():
    assert [path.stem for path in COMPLETE] == ["default"]


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_a_file_of_every_setting_has_every_setting(path):
    # As text: what a file leaves out would be filled in with defaults when it is read.
    assert yaml.safe_load(path.read_text()) == load_config(path).model_dump(mode="json")


def test_the_default_file_says_what_the_defaults_are():
    assert load_config(CONFIGS / "default.yaml") == Config()


def test_the_papers_settings_are_the_papers():
    config = load_config(CONFIGS / "paper.yaml")
    assert config.preprocess.reconstruct is not None
    assert config.preprocess.reconstruct.colors == ["red", "green", "blue", "cyan"]
    assert config.preprocess.histogram is not None
    assert config.preprocess.gaussian is not None
    assert config.segment.method == "cellpose"
    assert (config.features.encoder, config.features.layer) == ("resnet152", "output")
    assert (config.cluster.k, config.cluster.components) == (11, None)
