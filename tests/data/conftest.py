"""Every data test has its own cache folder, and sees no images of this machine unless it is marked `real_data`."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CDFKD_CACHE", str(folder))
    if request.node.get_closest_marker("real_data") is None:
        monkeypatch.delenv("CDFKD_DATA", raising=False)
    return folder
