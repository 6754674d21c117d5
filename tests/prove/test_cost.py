import torch
from torch import nn

from vitreous.prove.cost import activation_peak, cost

N, C, DEPTH = 17, 32, 2
BLOCK = N * C * 3 * C + 2 * N * N * C + N * C * C + 2 * N * C * 4 * C
VIT = 16 * (3 * 8 * 8) * C + DEPTH * BLOCK + C * 5


def test_cost_of_a_module(vit, images):
    found = cost("vit", vit, images[0])
    assert found.parameters == sum(p.numel() for p in vit.parameters())
    assert found.bytes == 4 * found.parameters
    assert found.macs == VIT
    assert found.memory is not None and found.memory > found.bytes + images[0].nbytes


def test_shared_and_half_weights_count_as_they_are_stored():
    shared = nn.Linear(8, 8, bias=False)
    tied = nn.Sequential(nn.Flatten(), shared, shared).half().float()
    assert cost("tied", tied, torch.zeros(1, 1, 2, 4)).bytes == 8 * 8 * 4
    small = nn.Sequential(nn.Flatten(), nn.Linear(8, 8, bias=False))
    small.register_buffer("scale", torch.zeros(8, dtype=torch.int8))
    assert cost("small", small, torch.zeros(1, 1, 2, 4)).bytes == 8 * 8 * 4 + 8


def test_activation_peak_frees_what_is_freed():
    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(10):
                x = x + 1
            return x.flatten(1)

    class Wide(nn.Module):
        def forward(self, x):
            return torch.stack([x + i for i in range(10)]).sum(0).flatten(1)

    x = torch.zeros(1, 1, 16, 16)
    assert activation_peak(Chain(), x) == 2 * x.nbytes
    assert activation_peak(Wide(), x) == 20 * x.nbytes


def test_a_callable_says_what_it_costs(images):
    def plain(x):
        return x.mean((1, 2, 3))[:, None]

    found = cost("plain", plain, images[0])
    assert (found.parameters, found.macs, found.bytes, found.memory) == (None,) * 4
    plain.macs, plain.parameters_count, plain.bytes = 7, 8, 9
    found = cost("plain", plain, images[0])
    assert (found.parameters, found.macs, found.bytes) == (8, 7, 9)
