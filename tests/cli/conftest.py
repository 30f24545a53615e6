from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch) -> Path:
    """Commands keep what they have under `runs` in the current folder: let that be an empty one."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    return Path.cwd()
