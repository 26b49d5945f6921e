import sys

import pytest

from configs.gpu_allocator import allocator_settings


def test_segments_grow_unless_the_user_has_settings_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allocator_settings({"HOME": "/"}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert allocator_settings({name: "max_split_size_mb:512"}) == {}
    monkeypatch.setattr(sys, "platform", "win32")
    assert allocator_settings({}) == {}
