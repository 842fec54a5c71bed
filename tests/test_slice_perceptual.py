"""Slices of volumes and the perceptual loss on them, with a tiny timm network of random weights in a file."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from common.cli import UserError
from common.losses import SlicePerceptual, take_slices

NAME = "test_resnet"
LEVELS = (0, 1, 2, 3)
SLICES = torch.tensor([[[0.0, 0.5], [0.999, 0.3], [0.1, 0.1]], [[0.7, 0.2], [0.0, 0.95], [0.4, 0.6]]])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).random(shape, dtype=np.float32)) * 2 - 1


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """With running statistics that are not those of a batch: a network in training mode answers otherwise."""
    torch.manual_seed(3)
    model = timm.create_model(NAME).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "network.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def loss(weights) -> SlicePerceptual:
    return SlicePerceptual(f"timm:{NAME}@{weights}")


# ---------------------------------------------------------------------------------------------------------------------
# slices


def test_slices_are_those_of_each_axis_and_sample():
    volume = draw(2, 3, 10, 7, 5)
    across_x, across_y, across_z = take_slices(volume, SLICES)
    # places x size, rounded down: x of 10, y of 7, z of 5
    for row, (sample, index) in enumerate([(0, 0), (0, 5), (1, 7), (1, 2)]):
        assert torch.equal(across_x[row], volume[sample, :, index])
    for row, (sample, index) in enumerate([(0, 6), (0, 2), (1, 0), (1, 6)]):
        assert torch.equal(across_y[row], volume[sample, :, :, index])
    for row, (sample, index) in enumerate([(0, 0), (0, 0), (1, 2), (1, 3)]):
        assert torch.equal(across_z[row], volume[sample, :, :, :, index])
    assert [tuple(s.shape) for s in (across_x, across_y, across_z)] == [(4, 3, 7, 5), (4, 3, 10, 5), (4, 3, 10, 7)]


def test_every_place_below_one_is_a_slice_and_all_slices_are_met():
    volume = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(1, 1, 6, 6, 6)
    last = torch.from_numpy(np.full((1, 3, 1), 1 - 1e-12)).float()  # which is 1, one too far
    assert take_slices(volume, last)[0].unique().tolist() == [5]
    evenly = ((torch.arange(60) + 0.5) / 60).expand(1, 3, 60)
    found = take_slices(volume, evenly)[0][:, 0, 0, 0]
    assert found.long().bincount().tolist() == [10] * 6


def test_gradients_reach_the_chosen_slices_alone():
    volume = draw(2, 1, 10, 7, 5).requires_grad_()
    sum(part.sum() for part in take_slices(volume, SLICES)).backward()
    expected = torch.zeros_like(volume)
    for sample in range(2):
        for k in range(2):
            x, y, z = (int(SLICES[sample, axis, k] * size) for axis, size in enumerate((10, 7, 5)))
            expected[sample, :, x] += 1
            expected[sample, :, :, y] += 1
            expected[sample, :, :, :, z] += 1
    assert expected.max() > 2 and torch.equal(volume.grad, expected)  # a slice chosen twice counts twice


# ---------------------------------------------------------------------------------------------------------------------
# the loss


def by_definition(network: nn.Module, output: Tensor, target: Tensor, slices: Tensor) -> Tensor:
    """Slice by slice, place by place as cosines, with timm's own access to the features of the whole network."""
    values = []
    for sample in range(len(output)):
        found = []
        for axis in range(3):
            for place in slices[sample, axis]:
                index = int(place * output.shape[2 + axis])
                pair = [v[sample, 0].select(axis, index).expand(1, 3, -1, -1) for v in (output, target)]
                images = [((image + 1) / 2 - 0.5) / 0.5 for image in pair]  # the network's own mean and deviation
                features = [network.forward_intermediates(x, intermediates_only=True) for x in images]
                for level in LEVELS:
                    a, b = (f[level].double() for f in features)
                    found.append((2 - 2 * torch.cosine_similarity(a, b, dim=1)).mean())
        values.append(torch.stack(found).mean())
    return torch.stack(values).float()


def test_the_loss_is_its_definition(loss, network):
    output, target = draw(2, 1, 48, 32, 40), draw(2, 1, 48, 32, 40, seed=1)
    with torch.no_grad():
        expected = by_definition(network, output, target, SLICES)
    value = loss(output, target, SLICES)
    assert value.shape == (2,) and value.min() > 0.01 and abs(value[0] - value[1]) > 1e-3
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_each_sample_and_only_its_own_slices_count(loss):
    output, target = draw(2, 1, 32, 32, 32), draw(2, 1, 32, 32, 32, seed=1)
    together = loss(output, target, SLICES)
    alone = torch.cat([loss(output[i : i + 1], target[i : i + 1], SLICES[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(loss(output, target, SLICES.flip(0)), together, rtol=1e-3)
    elsewhere = output.clone()  # changed outside the chosen slices
    chosen = [[int(place * 32) for place in places] for places in SLICES[0]]
    rest = [torch.tensor([i for i in range(32) if i not in indices]) for indices in chosen]
    elsewhere[0, 0, rest[0][:, None, None], rest[1][None, :, None], rest[2][None, None]] = 5.0
    assert torch.equal(loss(elsewhere, target, SLICES), together)


def test_the_output_alone_is_taught(loss):
    output, target = draw(1, 1, 32, 32, 32).requires_grad_(), draw(1, 1, 32, 32, 32, seed=1).requires_grad_()
    loss(output, target, SLICES[:1]).sum().backward()
    assert target.grad is None and not any(p.requires_grad for p in loss.parameters())
    touched = output.grad[0, 0] != 0
    expected = torch.zeros(32, 32, 32, dtype=torch.bool)
    for axis in range(3):
        for place in SLICES[0, axis]:
            expected.select(axis, int(place * 32)).fill_(True)
    assert not (touched & ~expected).any() and touched.sum() > 0.9 * expected.sum()
    same = target.detach().clone().requires_grad_()
    value = loss(same, target, SLICES[:1])
    value.sum().backward()
    assert value.item() == 0 and same.grad.abs().max() == 0


def test_features_that_are_all_zero_give_finite_gradients(weights):
    """As of VGG in air. Here the last batch norm of each level is made to answer with nothing."""
    module = SlicePerceptual(f"timm:{NAME}@{weights}", levels=(0, 1))
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.zero_()
            norm.bias.fill_(-1)
    output = draw(1, 1, 16, 16, 16).requires_grad_()
    value = module(output, draw(1, 1, 16, 16, 16, seed=1), SLICES[:1])
    value.sum().backward()
    assert value.isfinite().all() and output.grad.isfinite().all()


def test_training_mode_changes_nothing(weights):
    module = SlicePerceptual(f"timm:{NAME}@{weights}")
    output, target = draw(1, 1, 32, 32, 32), draw(1, 1, 32, 32, 32, seed=1)
    before, state = module(output, target, SLICES[:1]), {k: v.clone() for k, v in module.state_dict().items()}
    parent = nn.Sequential(module)
    parent.train()
    assert parent.training and not any(part.training for part in module.modules())
    assert torch.equal(module(output, target, SLICES[:1]), before)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_autocast_runs_the_network_and_sums_in_float32(loss):
    output = draw(2, 1, 32, 32, 32)
    target = output + 0.3 * draw(2, 1, 32, 32, 32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(output.bfloat16(), target, SLICES)
    exact = loss(output, target, SLICES)
    assert value.dtype == torch.float32 and not torch.equal(value, exact)
    torch.testing.assert_close(value, exact, rtol=0.05, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# weights


def test_a_file_is_read_to_the_last_weight_and_leaves_the_random_numbers_alone(network, tmp_path):
    torch.save({key: value.half() for key, value in network.state_dict().items()}, tmp_path / "half.pth")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    module = SlicePerceptual(f"timm:{NAME}@{tmp_path / 'half.pth'}", levels=(0, 2))
    assert torch.equal(torch.rand(3), expected)
    theirs, mine = network.state_dict(), module.backbone.state_dict()
    assert len(mine) > 40
    for key, value in mine.items():
        wanted = theirs[key]
        torch.testing.assert_close(value, wanted.half().to(value.dtype), rtol=0, atol=0)


def test_torchvisions_vgg_fits(tmp_path, monkeypatch):
    """timm joins `features.0` of a VGG to `features_0`. Narrowed to be quick."""
    plan = [4, "M", 6, "M", 8, 8, "M", 8, 8, "M", 8, 8, "M"]
    monkeypatch.setitem(timm.models.vgg.cfgs, "vgg11", plan)
    layers = torchvision.models.vgg.make_layers(plan)
    torch.save({f"features.{key}": value for key, value in layers.state_dict().items()}, tmp_path / "vgg.pth")
    module = SlicePerceptual(f"timm:vgg11@{tmp_path / 'vgg.pth'}")
    assert module.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    images = draw(1, 3, 32, 32)
    relus = [1, 4, 9, 14]  # the last activation before each pooling
    for found, end in zip(module.backbone(images), relus, strict=True):
        torch.testing.assert_close(found, layers[: end + 1](images))


def test_weights_that_do_not_fit_are_sentences(network, tmp_path):
    state = network.state_dict()
    first = next(key for key in state if key.startswith("conv1"))
    files = {
        "renamed": {f"module.{key}": value for key, value in state.items()},
        "shape": state | {first: torch.zeros(3)},
        "part": {key: value for key, value in state.items() if not key.startswith("layer3")},
        "list": [1, 2],
        "nested": {"weights": state},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(
            UserError, match=f"--perceptual timm:{NAME}@.*{name}.pth does not hold the weights of timm's {NAME}"
        ):
            SlicePerceptual(f"timm:{NAME}@{tmp_path / name}.pth")
    (tmp_path / "text.safetensors").write_bytes(b"text")
    for path in (tmp_path / "text.safetensors", tmp_path / "missing.pth"):
        with pytest.raises(UserError, match=f"--perceptual .*{path.name} cannot be read"):
            SlicePerceptual(f"timm:{NAME}@{path}")
    for wrong in ("vgg19", "timm:", "timm:vgg19@", "lpips:alex"):
        with pytest.raises(UserError, match=f"--perceptual {wrong}: give timm:NAME"):
            SlicePerceptual(wrong)
    with pytest.raises(UserError, match="--perceptual timm:test_vit@.* has not 3 sizes"):
        SlicePerceptual(f"timm:test_vit@{tmp_path / 'renamed.pth'}", levels=(0, 1, 2))


def test_without_a_network_there_is_a_way_out(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in (NAME, "no_such_network"):
        with pytest.raises(
            UserError, match=f"--perceptual timm:{name} cannot.*timm:NAME@FILE.*--perceptual-weight 0"
        ) as found:
            SlicePerceptual(f"timm:{name}")
        assert "\n" not in str(found.value)
