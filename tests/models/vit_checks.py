"""What the tests of all vision transformers ask of a model, whatever its options."""

import torch
from torch import nn


def parameters(model):
    return sum(value.numel() for value in model.parameters())


def lively(model):
    """The model with weights as after a training: nothing at its neutral value."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
            for parameter in module.parameters(recurse=False):
                if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                elif parameter.ndim > 1:
                    parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def raw(model, x_BCHW, sizes_B2=None):
    """What the model itself computes, at padded sizes."""
    return (model.grid if model.task == "segment" else model.scores)(x_BCHW, sizes_B2)


def check_items_keep_apart(model):
    """Items of different sizes in one pass answer as they do alone; around them lies NaN."""
    model = model.double()
    step = model.multiple
    sizes = [(1, 1), (2 * step + 1, 3 * step), (step, 4 * step - 1), (3 * step, 2)]
    canvas = 3 * step, 4 * step
    x_BCHW = torch.full((len(sizes), model.channels, *canvas), torch.nan, dtype=torch.float64)
    for x_CHW, (h, w) in zip(x_BCHW, sizes, strict=True):
        x_CHW[:, :h, :w] = torch.randn(model.channels, h, w)

    for form in (model, model.folded()):
        with torch.inference_mode():
            together = raw(form, *form.together(x_BCHW, sizes))
            for i, x_1CHW in enumerate(form.alone(x_BCHW, sizes)):
                alone = raw(form, x_1CHW)
                found = together[i : i + 1]
                if form.task == "segment":
                    h, w = alone.shape[-2:]
                    found = found[..., :h, :w]
                torch.testing.assert_close(found, alone, rtol=0, atol=1e-9)


def check_folded(model):
    """The folded form gives the same answers, and what it answers is not all the same."""
    step = model.multiple
    native = model.config.image
    for kind, most in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        model.to(kind)
        folded = model.folded()
        assert not folded.training
        for size in (native, (2 * step + 1, 5 * step - 2)):
            x_BCHW = torch.randn(3, model.channels, *size, dtype=kind)
            with torch.inference_mode():
                plain, found = model(x_BCHW), folded(x_BCHW)
            spread = plain.std(dim=(0, 2, 3) if plain.ndim == 4 else 0)
            assert (spread > 1e-2 * plain.abs().max()).all()
            assert (found - plain).abs().max() <= most * plain.abs().max()
            assert torch.equal(found.argmax(1), plain.argmax(1))


def check_compiled(model):
    """Tracing finds nothing that Python would have to decide at run time."""
    torch.compiler.reset()  # or the number of models traced so far would count
    x_BCHW = torch.randn(2, model.channels, *model.config.image)
    for form in (model, model.folded()):
        traced = torch.compile(
            lambda x_BCHW, form=form: raw(form, x_BCHW), backend="eager", fullgraph=True
        )
        with torch.inference_mode():
            assert torch.equal(traced(x_BCHW), raw(form, x_BCHW))


def learnt_by_heart(model, x_BCHW, labels, steps, rate=1e-3):
    """The share of right answers after so many steps on one batch."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=rate)
    for step in range(steps):
        for group in optimizer.param_groups:  # a ramp down, or the last step would decide
            group["lr"] = rate * min(1, 2 * (1 - step / steps))
        loss = nn.functional.cross_entropy(model(x_BCHW), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (model.eval()(x_BCHW).argmax(1) == labels).float().mean().item()


def discs(count, side):
    """Bright discs on a noisy ground, and where they are."""
    rows_HW, columns_HW = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centre_B211 = torch.randint(side // 4, 3 * side // 4, (count, 2, 1, 1))
    distance_BHW = (rows_HW - centre_B211[:, 0]) ** 2 + (columns_HW - centre_B211[:, 1]) ** 2
    labels_BHW = (distance_BHW < (side / 4) ** 2).long()
    x_B1HW = labels_BHW[:, None] + 0.2 * torch.randn(count, 1, side, side)
    return x_B1HW.expand(-1, 3, -1, -1), labels_BHW
