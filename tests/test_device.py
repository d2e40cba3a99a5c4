"""Devices and their precisions."""

import logging

import pytest
import torch

from pipeline.device import warn_of_emulation

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("value", "device", "supported", "warns"),
    [
        ("bfloat16", CPU, False, True),
        ("bf16", CPU, False, True),
        ("float16", CPU, False, True),
        ("bfloat16", CPU, True, False),
        ("float32", CPU, False, False),
        ("no", CPU, False, False),
        ("bfloat16", torch.device("meta"), False, False),
    ],
)
def test_types_without_instructions_are_warned_of(value, device, supported, warns, monkeypatch, caplog):
    for kind in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", lambda: supported)
    with caplog.at_level(logging.WARNING):
        warn_of_emulation("encode.precision", value, device)
    assert [value in record.getMessage() for record in caplog.records] == [True] * warns
