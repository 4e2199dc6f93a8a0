import torch

from moe_kernels.models.segmentation import denormals


def test_what_has_no_gradient_any_more_becomes_zero_and_never_a_denormal_number():
    weight = torch.nn.Parameter(torch.randn(2, 50))
    plain = torch.nn.Parameter(weight.detach().clone())
    flushed, usual = (torch.optim.Adam([parameter], 1e-4) for parameter in (weight, plain))
    moments = []
    for done in range(1, 1001):
        weight.grad = torch.randn(2, 50)
        if done > 1:
            weight.grad[0] = 0
        plain.grad = weight.grad.clone()
        flushed.step()
        usual.step()
        if done % denormals.EVERY == 0:
            denormals.flush_(flushed)
        moments.append(flushed.state[weight]["exp_avg"][0].clone())
    moments = torch.stack(moments)
    tiny = torch.finfo(torch.float32).tiny
    assert not ((moments != 0) & (moments.abs() < tiny)).any()
    assert not moments[-1].any()
    left = usual.state[plain]["exp_avg"][0]
    assert ((left != 0) & (left.abs() < tiny)).any()  # or there would be nothing to mend
    assert torch.equal(weight, plain)
    assert flushed.state[weight]["exp_avg"][1].all()
