"""Modules that compute something else for a while."""

import pytest
import torch
from torch import nn

from hf_cptquant.forwards import computing


def test_modules_compute_something_else_and_then_what_they_did_before():
    plain, own = nn.Linear(2, 2), nn.Linear(2, 2)
    own.forward = lambda x: 3 * x
    x = torch.ones(2)
    before = plain(x)
    with computing({plain: lambda x: 5 * x, own: lambda x: 7 * x}):
        assert torch.equal(plain(x), 5 * x)
        assert torch.equal(own(x), 7 * x)
    assert torch.equal(plain(x), before)
    assert "forward" not in plain.__dict__
    assert torch.equal(own(x), 3 * x)


def test_they_do_after_an_error_too():
    module = nn.Linear(2, 2)
    with pytest.raises(KeyError, match="within"), computing({module: lambda x: x}):
        raise KeyError("within")
    assert "forward" not in module.__dict__
