"""A function as a CUDA graph: with a CUDA that is made up, and where there is a GPU with that."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from moe_kernels.models.segmentation.replay import WARM_UP, Replayed

CPU = torch.device("cpu")


class FakeCuda:
    """What ``torch.cuda`` does, as far as it can be seen: a capture runs nothing, a replay what was captured."""

    def __init__(self):
        fake = self
        fake.log, fake.graphs, fake.now = [], [], None

        class Stream:
            def wait_stream(self, other):
                fake.log.append("wait")

        class CUDAGraph:
            def __init__(self):
                fake.graphs.append(self)
                self.kernels = []

            def replay(self):
                fake.log.append("replay")
                for kernel in self.kernels:
                    kernel()

        self.Stream = self.current_stream = Stream
        self.CUDAGraph = CUDAGraph
        self.stream = lambda stream: nullcontext()
        self.device = lambda device: nullcontext()

    @contextmanager
    def graph(self, graph):
        self.now = graph
        yield
        self.now = None

    def launch(self, kernel):
        if self.now is None:
            self.log.append("launch")
            kernel()
        else:
            self.now.kernels.append(kernel)


def test_calls_are_launches_then_replays_with_arguments_of_their_own():
    cuda, total = FakeCuda(), torch.zeros(2)

    def function(x, y):
        cuda.launch(lambda: total.add_(x * y))

    call = Replayed(function, CPU, cuda)
    expected = torch.zeros(2)
    for number in range(WARM_UP + 3):
        x, y = torch.randn(2), torch.randn(2)
        call(x, y)
        expected += x * y
        torch.testing.assert_close(total, expected)
        assert len(cuda.graphs) == (number >= WARM_UP)
    assert cuda.log == ["wait", "launch", "wait"] * WARM_UP + ["replay"] * 3


def test_shapes_are_those_of_the_first_call():
    call = Replayed(lambda x: None, CPU, FakeCuda())
    call(torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        call(torch.zeros(4))
    with pytest.raises(ValueError, match="zip"):
        call(torch.zeros(3), torch.zeros(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_training_as_a_graph_is_training():
    batches = [torch.randn(10, 6) for _ in range(8)]

    def trained(wrap):
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 1).cuda()
        optimizer = torch.optim.Adam(net.parameters(), 1e-2, fused=True, capturable=True)

        def step(x):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

        call = wrap(step)
        for batch in batches:
            call(batch)
        return net.weight.detach().cpu()

    device = torch.device("cuda")
    plain = trained(lambda step: lambda x: step(x.to(device)))
    torch.testing.assert_close(trained(lambda step: Replayed(step, device)), plain)
