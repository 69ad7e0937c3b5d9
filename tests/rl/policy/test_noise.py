"""The counter-based generator: fixed, independent of the batch, and statistically sound."""

import torch

from rl.policy.noise import Stream, normal, uniform

PINNED = [-1.451335, 0.582793, -0.191297]


def test_values_are_pinned():
    # A change here changes every seeded run: the vLLM engine must reproduce these numbers.
    seed, counter = torch.tensor([7, 7, 8]), torch.tensor([0, 1, 0])
    drawn = normal(seed, Stream.LATENT, counter, 3)
    again = normal(seed[1:], Stream.LATENT, counter[1:], 3)
    torch.testing.assert_close(drawn[1:], again, rtol=0, atol=0)
    torch.testing.assert_close(drawn[0], torch.tensor(PINNED), rtol=1e-5, atol=1e-6)
    assert len({tuple(row) for row in drawn.tolist()}) == 3


def test_wider_draws_do_not_depend_on_neighbours():
    seed, counter = torch.arange(5), torch.arange(5)
    whole = uniform(seed, Stream.TOKEN, counter)
    for i in range(5):
        assert uniform(seed[i : i + 1], Stream.TOKEN, counter[i : i + 1]) == whole[i]


def test_streams_differ():
    seed, counter = torch.tensor([3]), torch.tensor([4])
    values = {float(uniform(seed, stream, counter)) for stream in Stream}
    assert len(values) == len(Stream)
    streams = torch.tensor([Stream.DECISION, Stream.TOKEN])
    rows = uniform(seed.expand(2), streams, counter.expand(2))
    each = [uniform(seed, stream, counter) for stream in (Stream.DECISION, Stream.TOKEN)]
    assert torch.equal(rows, torch.cat(each))


def test_normals_are_normal_and_uncorrelated():
    drawn = normal(torch.arange(400), Stream.LATENT, torch.arange(400), 64).double()
    n = drawn.numel()
    assert abs(drawn.mean()) < 4 / n**0.5
    assert abs(drawn.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(drawn.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    columns = torch.corrcoef(drawn.T) - torch.eye(64)
    assert columns.abs().max() < 5 / 400**0.5


def test_uniforms_stay_inside_and_fill_the_interval():
    drawn = uniform(torch.arange(20000), Stream.TOKEN, torch.zeros(20000, dtype=torch.long))
    assert drawn.min() > 0 and drawn.max() < 1
    counts = torch.histc(drawn, 20, 0, 1)
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()
