"""What every listed model must do: inherit the class of its task, name the model, and be tested.

MODELS.md sections 0.1 and 8, point by point, at a small config; what only one network does is
tested beside it. `tests/models/state_dicts/` holds the frozen names and shapes of the weights:
published checkpoints must load for ever.
"""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import nn

import models
from models.training.losses import Loss
from models.training.recipes import Terms

PICTURES = Path(__file__).parents[2] / "docs" / "pictures" / "loose"
STATE_DICTS = Path(__file__).parent / "state_dicts"


class NetworkContract:
    """A small config of one model."""

    name: str
    config: dict[str, models.Json] = {}  # noqa: RUF012 - subclasses replace it, nobody writes to it
    variant: str = ""
    """Tells two contracts of one model apart."""
    scale: float = 1.2
    """Deviation of a layer's answers, if those before it have 1: enough to differ by pixel."""

    def build(self, **config):
        return models.build(self.name, **{**self.config, **config}).eval()

    def lively(self, **config):
        """A model with weights as after a training: nothing at its neutral value."""
        model = self.build(**config)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 2)
                for parameter in module.parameters(recurse=False):
                    if parameter.ndim > 1:
                        parameter.normal_(0, self.scale * parameter[0].numel() ** -0.5)
                    else:
                        parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    positions_by_item: bool = False
    """Whether it makes a table for every size it meets: it must look at the numbers then."""

    def unequal(self):
        """Sizes of a batch for the meta device, which has no numbers."""
        return [] if self.positions_by_item else [torch.tensor([[48, 40], [33, 61]])]

    def raw(self, model, x_BCHW, sizes_B2=None):
        """What the subclass of Network computes itself, at padded sizes."""
        raise NotImplementedError

    def own(self, model, answer, size):
        """The part of an item's raw answer that means something."""
        raise NotImplementedError

    def sizes(self, model):
        """The smallest, odd, narrow and wide, on and off the steps of the net."""
        low, step = model.min_side, model.multiple
        return [(low, low), (low + 1, 3 * low + 37), (61, low), (33, 50), (2 * step + 32, 32)]

    # ------------------------------------------------------------------------------ its weights

    def test_the_state_dict_is_the_frozen_one(self):
        state = self.build().state_dict()
        found = [f"{key} {list(value.shape)}" for key, value in state.items()]
        file = STATE_DICTS / f"{self.name}{self.variant and '.' + self.variant}.txt"

        assert found == file.read_text().splitlines(), f"checkpoints would not load; see {file}"

    def test_a_config_survives_json_and_the_weights_fit_strictly(self):
        model = self.build()

        again = models.build(self.name, **json.loads(json.dumps(model.config.to_json())))

        assert again.config == model.config
        again.load_state_dict(model.state_dict(), strict=True)

    def test_it_can_be_counted_without_memory(self):
        with torch.device("meta"):
            model = self.build()

        assert all(value.is_meta for value in model.parameters())

    def test_a_model_of_one_class_is_refused(self):
        with pytest.raises(ValueError, match="at least 2, it is 1"):
            self.build(classes=1)

    def test_building_and_answering_warn_of_nothing(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = self.build()
            model(torch.randn(1, model.channels, 64, 64))
            model.folded()(torch.randn(1, model.channels, 64, 64))

    # ---------------------------------------------------------------------------- what it reads

    def test_other_channels_are_refused(self):
        with pytest.raises(ValueError, match="reads 3 channels, the batch has 1"):
            self.build()(torch.zeros(1, 1, 64, 64))

    def test_gray_models_read_gray_pictures(self):
        assert self.build(channels=1)(torch.randn(2, 1, 64, 64)).shape[0] == 2

    def test_sizes_that_do_not_fit_the_batch_are_refused(self):
        with pytest.raises(ValueError, match="fit into the batch"):
            self.build()(torch.zeros(1, 3, 64, 64), torch.tensor([[64, 65]]))
        with pytest.raises(ValueError, match=r"\(1, 2\)"):
            self.build()(torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64]] * 2))

    @pytest.mark.parametrize("value", [0.0, -1.0, 100.0])
    def test_a_constant_picture_gives_numbers(self, value):
        model = self.lively()

        assert model(torch.full((1, 3, 64, 48), value)).isfinite().all()

    # ----------------------------------------------------------------------- alone and together

    def test_an_answer_on_the_cpu_does_not_depend_on_batch_mates_by_a_single_bit(self):
        model = self.lively()
        x_BCHW = torch.randn(4, 3, 61, 64)
        sizes_B2 = torch.tensor([[61, 64], [40, 64], [61, 33], [33, 40]])

        with torch.inference_mode():
            together = model(x_BCHW, sizes_B2)
            for i, (h, w) in enumerate(sizes_B2.tolist()):
                alone = model(x_BCHW[i : i + 1], sizes_B2[i : i + 1])
                cut = model(x_BCHW[i : i + 1, :, :h, :w])
                assert torch.equal(together[i], alone[0])
                assert torch.equal(alone[..., :h, :w] if alone.ndim == 4 else alone, cut)

    def test_items_masked_in_one_pass_answer_as_they_do_alone(self):
        """The way of the GPU, walked on the CPU; what lies outside of an item may be NaN."""
        model = self.lively().double()
        sizes = self.sizes(model)
        canvas = max(h for h, _ in sizes), max(w for _, w in sizes)
        x_BCHW = torch.full((len(sizes), 3, *canvas), math.nan, dtype=torch.float64)
        for x_CHW, (h, w) in zip(x_BCHW, sizes, strict=True):
            x_CHW[:, :h, :w] = torch.randn(3, h, w)

        for form in (model, model.folded()):
            with torch.inference_mode():
                together = self.raw(form, *form.together(x_BCHW, sizes))
                singles = form.alone(x_BCHW, sizes)
                for i, size in enumerate(sizes):
                    alone = self.own(form, self.raw(form, singles[i]), size)
                    found = self.own(form, together[i : i + 1], size)
                    torch.testing.assert_close(found, alone, rtol=0, atol=1e-9)

    def test_padding_by_hand_changes_nothing(self):
        model = self.lively().double()
        x_1CHW = torch.randn(1, 3, 33, 50, dtype=torch.float64)
        height, width = model.padded_size(33, 50)
        by_hand_1CHW = nn.functional.pad(x_1CHW, (0, width - 50, 0, height - 33))

        found = (
            model(by_hand_1CHW)[..., :33, :50] if model.task == "segment" else model(by_hand_1CHW)
        )

        torch.testing.assert_close(found, model(x_1CHW), rtol=0, atol=1e-12)

    def test_gradient_mode_changes_nothing(self):
        model = self.lively()
        x_BCHW = torch.randn(2, 3, 64, 64)

        with torch.inference_mode():
            inferred = model(x_BCHW)

        assert torch.equal(model(x_BCHW), inferred)

    def test_one_and_two_threads_agree(self):
        model = self.lively()
        x_BCHW = torch.randn(1, 3, 96, 80)
        one = model(x_BCHW)
        torch.set_num_threads(2)

        torch.testing.assert_close(
            model(x_BCHW), one, rtol=1e-5, atol=1e-6 * one.abs().max().item()
        )

    def test_the_memory_layout_of_a_batch_does_not_matter(self):
        model = self.lively(channels=1)
        x_BCHW = torch.randn(3, 1, 64, 48)
        expected = model(x_BCHW)

        assert torch.equal(model(x_BCHW.to(memory_format=torch.channels_last)), expected)
        assert torch.equal(model(x_BCHW.mT.contiguous().mT), expected)

    # ------------------------------------------------------------------------- the folded form

    @pytest.mark.parametrize(("kind", "most"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
    def test_the_folded_form_gives_the_same_answers(self, kind, most):
        model = self.lively(classes=5).to(kind)
        folded = model.folded()
        assert not folded.training
        for key in ("task", "classes", "channels", "stride", "multiple", "min_side", "config"):
            assert getattr(folded, key) == getattr(model, key)

        for size in ((64, 64), (61, 90)):
            x_BCHW = torch.randn(2, 3, *size, dtype=kind)
            with torch.inference_mode():
                plain, found = model(x_BCHW), folded(x_BCHW)
            spread = plain.std(dim=(0, 2, 3) if plain.ndim == 4 else 0)
            assert (spread > 1e-3 * plain.abs().max()).all()  # else equality would prove nothing
            assert (found - plain).abs().max() <= most * plain.abs().max()
            assert torch.equal(found.argmax(1), plain.argmax(1))

    def test_folding_leaves_the_plain_form_as_it_was(self):
        model = self.lively()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        wanted = [value.requires_grad for value in model.parameters()]

        model.folded()

        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert [value.requires_grad for value in model.parameters()] == wanted

    # -------------------------------------------------------------------------------- learning

    unfelt: tuple[str, ...] = ()
    """Parameters that no gradient reaches by construction, such as biases of keys."""

    def test_every_parameter_gets_a_gradient(self):
        model = self.lively().train()
        logits = model(torch.randn(4, 3, 64, 64))
        (logits * torch.randn_like(logits)).sum().backward()

        felt = {
            key: value
            for key, value in model.named_parameters()
            if not any(key.endswith(end) for end in self.unfelt)
        }
        idle = [key for key, value in felt.items() if value.grad is None or not value.grad.any()]
        assert idle == []


class SegmenterContract(NetworkContract):
    """A model that scores pixels."""

    def raw(self, model, x_BCHW, sizes_B2=None):
        return model.grid(x_BCHW, sizes_B2)

    def own(self, model, answer, size):
        h, w = model.native_size(*size)
        return answer[:, :, :h, :w]

    def test_every_size_is_answered_at_its_own(self):
        model = self.build(classes=3)

        for size in [*self.sizes(model), (48, 131)]:
            x_BCHW = torch.randn(1, 3, *size)
            assert model(x_BCHW).shape == (1, 3, *size)
            assert model(x_BCHW, native=True).shape == (1, 3, *model.native_size(*size))
            assert model(x_BCHW).isfinite().all()

    def test_scores_at_full_size_are_the_native_ones_stretched(self):
        model = self.lively()
        x_BCHW = torch.randn(2, 3, 45, 64)

        stretched_BKHW = nn.functional.interpolate(
            model(x_BCHW, native=True),
            size=model.span(45, 64),
            mode="bilinear",
            align_corners=False,
        )

        assert torch.equal(model(x_BCHW), stretched_BKHW[:, :, :45, :64])

    @pytest.mark.parametrize("native", [True, False])
    def test_elsewhere_than_on_the_cpu_a_batch_passes_in_one_go(self, native):
        """Shapes only: the meta device stands for a GPU."""
        model = self.build().to("meta")
        x_BCHW = torch.zeros(2, 3, 48, 61, device="meta")
        size = model.native_size(48, 61) if native else (48, 61)

        for sizes_B2 in (None, *self.unequal()):
            assert model(x_BCHW, sizes_B2, native=native).shape == (2, 2, *size)

    def test_labels_that_are_all_ignored_teach_nothing_and_break_nothing(self):
        model = self.build().train()
        labels_BHW = torch.full((2, 32, 32), 255)

        loss = Loss(Terms())(model(torch.randn(2, 3, 32, 32)), labels_BHW)
        loss.backward()

        assert loss.item() == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())

    steps: int = 150
    """How many steps it is given to learn one picture by heart."""
    rate: float = 3e-3
    """At what learning rate."""

    def test_it_learns_a_real_picture_by_heart(self):
        x_BCHW, labels_BHW = real_batch()
        model = self.build().train()
        optimizer = torch.optim.Adam(model.parameters(), lr=self.rate)

        for step in range(self.steps):
            for group in optimizer.param_groups:  # a ramp down, or the last step would decide
                group["lr"] = self.rate * min(1, 2 * (1 - step / self.steps))
            loss = Loss(Terms())(model(x_BCHW), labels_BHW)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        hits_BHW = model.eval()(x_BCHW).argmax(1) == labels_BHW
        assert hits_BHW.float().mean() > 0.99


class ClassifierContract(NetworkContract):
    """A model that scores pictures."""

    def raw(self, model, x_BCHW, sizes_B2=None):
        return model.scores(x_BCHW, sizes_B2)

    def own(self, model, answer, size):
        return answer

    def test_every_size_is_answered(self):
        model = self.build(classes=3)

        for size in [*self.sizes(model), (48, 131)]:
            answer_BK = model(torch.randn(1, 3, *size))
            assert answer_BK.shape == (1, 3)
            assert answer_BK.isfinite().all()

    def test_elsewhere_than_on_the_cpu_a_batch_passes_in_one_go(self):
        model = self.build().to("meta")
        x_BCHW = torch.zeros(2, 3, 48, 61, device="meta")

        for sizes_B2 in (None, *self.unequal()):
            assert model(x_BCHW, sizes_B2).shape == (2, 2)

    def test_it_learns_the_parts_of_a_real_picture_by_heart(self):
        x_BCHW = torch.cat(
            [half for part in real_batch()[0].split(1) for half in part.split(32, 2)]
        )
        labels_B = torch.tensor([0, 1, 1, 0])
        model = self.build().train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

        for _ in range(60):
            loss = nn.functional.cross_entropy(model(x_BCHW), labels_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        assert torch.equal(model.eval()(x_BCHW).argmax(1), labels_B)


def real_batch(side=64):
    """Two parts of a microscope picture that ships, and where they are bright (Otsu 1979).

    Enlarged and smoothed: edges finer than a model's native grid are not what is tested.
    """
    with Image.open(PICTURES / "fluorescence-dense.png") as picture:
        larger = picture.convert("L").resize((4 * side, 4 * side), Image.Resampling.BICUBIC)
        gray_HW = np.asarray(larger.filter(ImageFilter.GaussianBlur(3)), dtype=np.float32) / 255
    labels_HW = torch.from_numpy(gray_HW > _otsu(gray_HW)).long()
    x_HW = torch.from_numpy((gray_HW - gray_HW.mean()) / gray_HW.std())
    corners = [(0, 0), (2 * side, 2 * side)]
    x_BHW = torch.stack([x_HW[y : y + side, x : x + side] for y, x in corners])
    labels_BHW = torch.stack([labels_HW[y : y + side, x : x + side] for y, x in corners])
    assert 0.2 < labels_BHW.float().mean() < 0.8  # else one class everywhere would nearly do
    return x_BHW[:, None].expand(-1, 3, -1, -1).contiguous(), labels_BHW


def _otsu(values_HW):
    """The threshold that parts the values best."""
    candidates = np.unique(values_HW)[1:]
    between = [
        (values_HW < t).mean()
        * (values_HW >= t).mean()
        * (values_HW[values_HW >= t].mean() - values_HW[values_HW < t].mean()) ** 2
        for t in candidates
    ]
    return candidates[int(np.argmax(between))]
