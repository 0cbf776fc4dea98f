"""The scenes and the toy cfg of the end-to-end tests."""

from __future__ import annotations

from tests.e2e.conftest import scenes, toy_cfg

__all__ = ["scenes", "toy_cfg"]
