"""Modules that compute something else for a while."""

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
