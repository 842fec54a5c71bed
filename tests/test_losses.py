"""The Haar transform against PyWavelets; each loss against its definition in float64; and what all losses promise."""

import math
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import pywt
import torch
import torchvision
from safetensors.torch import save_file
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from common import losses
from common.cli import UserError
from common.wavelets import haar, inverse_haar

B, K = 3, 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).random(shape, dtype=np.float32))


def sample(seed: int = 0, height: int = 37, width: int = 45) -> dict[str, Tensor]:
    """A batch of odd sizes, with outputs beyond [0, 1] and mates that differ by orders of magnitude."""
    scale = torch.tensor([1.0, 0.01, 3.0])
    images = scale[:, None, None, None]
    target = draw(B, 3, height, width, seed=seed)
    masks = draw(B, K, 9, 14, seed=seed + 1) * torch.tensor([1.0, 0.05, 0.5])[:, None, None, None]
    masks[0, 2], masks[2] = 0, 0
    return {
        "output": target + images * (draw(B, 3, height, width, seed=seed + 2) - 0.5),
        "target": target,
        "masks": masks,
        "gates": draw(B, 16, 19, 23, seed=seed + 3),
        "mask_logits": 8 * draw(B, K, 5, 6, seed=seed + 4) - 4,
        "logits": images[..., 0, 0] * (8 * draw(B, K, seed=seed + 5) - 4),
        "probs": draw(B, K, seed=seed + 6).softmax(1),
        "confidence": draw(B, seed=seed + 7),
        "prediction": draw(B, 12, seed=seed + 8) - 0.5,
        "code": draw(B, 12, seed=seed + 9) - 0.5,
    }


def nothing() -> dict[str, Tensor]:
    """Where quotients, roots and logarithms meet zero: no difference, no variation, empty masks, codes of length 0."""
    grey = torch.full((B, 3, 37, 45), 0.5)
    return {
        "output": grey.clone(),
        "target": grey,
        "masks": torch.zeros(B, K, 9, 14),
        "gates": torch.full((B, 16, 19, 23), 0.3),
        "mask_logits": torch.zeros(B, K, 5, 6),
        "logits": torch.zeros(B, K),
        "probs": torch.eye(K)[:B],
        "confidence": torch.zeros(B),
        "prediction": torch.zeros(B, 12),
        "code": torch.zeros(B, 12),
    }


CASES = {
    "charbonnier": lambda s: losses.charbonnier(s["output"], s["target"]),
    "ssim": lambda s: losses.ssim_loss(s["output"], s["target"]),
    "hf": lambda s: losses.frequency(s["output"], s["target"], hf_weight=s["masks"][:, :1])["hf"],
    "lf": lambda s: losses.frequency(s["output"], s["target"], lf_weight=s["masks"][:, 1:2])["lf"],
    "region": lambda s: losses.region(s["output"], s["target"], s["masks"]),
    "feature": lambda s: losses.feature_alignment(s["gates"], s["masks"]),
    "kd": lambda s: losses.degradation_kl(s["logits"], s["probs"], s["confidence"], 2.0),
    "mask": lambda s: losses.mask_loss(s["mask_logits"], s["masks"]),
    "code": lambda s: losses.code_loss(s["prediction"], s["code"]),
    "tv": lambda s: losses.total_variation(s["output"]),
}
STUDENT = ("output", "gates", "mask_logits", "logits", "prediction")
every_loss = pytest.mark.parametrize("loss", CASES.values(), ids=CASES)


def gradients(loss, batch: dict[str, Tensor], autocast: bool = False) -> list[Tensor]:
    leaves = {key: batch[key].detach().clone().requires_grad_() for key in STUDENT}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(batch | leaves)
    value.sum().backward()
    return [leaf.grad for leaf in leaves.values() if leaf.grad is not None]


# ---------------------------------------------------------------------------------------------------------------------
# what all losses promise


@every_loss
def test_one_value_per_sample_whatever_its_mates(loss):
    batch = sample()
    together = loss(batch)
    alone = torch.cat([loss({key: value[i : i + 1] for key, value in batch.items()}) for i in range(B)])
    assert together.shape == (B,) and len(set(together.tolist())) == B
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)


@every_loss
def test_autocast_and_half_types_change_nothing(loss):
    batch = sample()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(batch)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, loss(batch), rtol=0, atol=1e-6)
    for one, other in zip(gradients(loss, batch, autocast=True), gradients(loss, batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    half = {key: value.bfloat16() for key, value in batch.items()}
    assert torch.equal(loss(half), loss({key: value.float() for key, value in half.items()}))


@every_loss
def test_gradients_are_finite_where_nothing_differs_or_varies(loss):
    for key in ("target", "output", "gates", "masks", "code", "prediction"):
        batch = nothing() | {key: sample()[key]}
        assert loss(batch).isfinite().all()
        grads = gradients(loss, batch, autocast=True)
        assert grads and all(grad.isfinite().all() and grad.abs().max() < 1e3 for grad in grads)


@pytest.mark.parametrize("name", ["ssim", "hf", "lf", "region", "mask", "code"])
def test_a_perfect_answer_costs_nothing(name):
    batch = sample()
    batch |= {"masks": draw(B, K, 5, 6) * 0.98 + 0.01, "output": batch["target"], "prediction": 7 * batch["code"]}
    batch["mask_logits"] = batch["masks"].logit()
    torch.testing.assert_close(CASES[name](batch), torch.zeros(B), rtol=0, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# wavelets


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_haar_is_that_of_pywavelets_and_exactly_invertible(layout):
    x = draw(2, 3, 12, 20).double().to(memory_format=layout)
    low, high = haar(x)
    bands = pywt.dwt2(x.numpy(), "haar")
    np.testing.assert_allclose(low, bands[0], atol=1e-14)
    for mine, theirs in zip(high.split(3, 1), bands[1], strict=True):  # cH, cV, cD
        np.testing.assert_allclose(mine, theirs, atol=1e-14)
    torch.testing.assert_close(inverse_haar(low, high), x, rtol=0, atol=1e-14)
    assert float(low.square().sum() + high.square().sum()) == pytest.approx(float(x.square().sum()), rel=1e-13)
    shuffled = high[:, [3, 4, 5, 0, 1, 2, 6, 7, 8]]  # the inverse knows rows from columns
    assert (inverse_haar(low, shuffled) - x).abs().max() > 0.1


def test_haar_differentiates():
    x = draw(1, 2, 4, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(haar, x)
    assert torch.autograd.gradcheck(inverse_haar, [part.detach().requires_grad_() for part in haar(x)])


def test_haar_keeps_float32_and_refuses_odd_sizes():
    x = draw(1, 2, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        low, high = haar(x.bfloat16())
        back = inverse_haar(low, high)
    assert low.dtype == high.dtype == back.dtype == torch.float32 and torch.equal(back, x.bfloat16().float())
    for shape in ((1, 1, 5, 6), (1, 1, 6, 5)):
        with pytest.raises(ValueError, match="even"):
            haar(torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------------------------
# definitions in float64


def resizing(old: int, new: int) -> np.ndarray:
    """One axis: cells averaged where there are more, else linear interpolation between their centres."""
    matrix = np.zeros((new, old))
    for i in range(new):
        if old >= new:
            start, stop = i * old // new, -(-(i + 1) * old // new)
            matrix[i, start:stop] = 1 / (stop - start)
        else:
            place = max((i + 0.5) * old / new - 0.5, 0)
            left = min(int(place), old - 1)
            matrix[i, left] += 1 - (place - left)
            matrix[i, min(left + 1, old - 1)] += place - left
    return matrix


def resized(masks: Tensor, size: tuple[int, int]) -> np.ndarray:
    height, width = masks.shape[2:]
    return resizing(height, size[0]) @ masks.double().numpy() @ resizing(width, size[1]).T


def close(mine: Tensor, truth: np.ndarray) -> None:
    np.testing.assert_allclose(mine.numpy(), truth, rtol=2e-5, atol=1e-6)


def images(seed: int = 0) -> tuple[dict[str, Tensor], np.ndarray, np.ndarray]:
    batch = sample(seed)
    return batch, batch["output"].double().numpy(), batch["target"].double().numpy()


@pytest.mark.parametrize("size", [(9, 14), (4, 5), (37, 45), (5, 31), (20, 3)])
def test_masks_are_averaged_down_and_interpolated_up(size):
    masks = sample()["masks"]
    close(losses.resize_masks(masks, size), resized(masks, size))


def test_charbonnier_and_total_variation():
    batch, output, target = images()
    close(losses.charbonnier(batch["output"], batch["target"]), np.sqrt((output - target) ** 2 + 1e-6).mean((1, 2, 3)))
    down, across = (np.abs(np.diff(output, axis=axis)).mean((1, 2, 3)) for axis in (2, 3))
    close(losses.total_variation(batch["output"]), down + across)


def test_ssim_is_scikit_images_gaussian_one_where_the_window_fits():
    batch, output, target = images()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1, "channel_axis": 0}
    maps = [structural_similarity(*pair, full=True, **options)[1] for pair in zip(output, target, strict=True)]
    close(losses.ssim_loss(batch["output"], batch["target"]), 1 - np.stack(maps)[..., 5:-5, 5:-5].mean((1, 2, 3)))


@pytest.mark.parametrize("grid", [(9, 14), (80, 31)])
def test_region(grid):
    batch, output, target = images()
    masks = draw(B, K, *grid)
    masks[:, 1] = 0
    m = resized(masks, output.shape[2:])[:, [0, 2, 3, 4]]
    error = np.abs(output - target)
    truth = np.einsum("bkhw,bchw->bk", m, error) / (3 * m.sum((2, 3)))
    close(losses.region(batch["output"], batch["target"], masks), truth.mean(1))


def test_region_of_constant_or_empty_masks_is_plain_l1():
    """Not three times as much, and not silently nothing."""
    batch, output, target = images()
    masks = torch.ones(B, K, 7, 7) * torch.linspace(0.1, 1, K)[:, None, None]
    masks[1] = 0
    close(losses.region(batch["output"], batch["target"], masks), np.abs(output - target).mean((1, 2, 3)))


@pytest.mark.parametrize("shape", [(37, 45), (36, 45), (37, 44), (36, 44)])
def test_frequency(shape):
    height, width = shape
    batch = sample(height=height, width=width)
    hf_map, lf_map = draw(B, 1, 9, 14, seed=8), draw(B, 1, 64, 64, seed=9)
    found = losses.frequency(batch["output"], batch["target"], hf_map, lf_map)
    pad = ((0, 0), (0, 0), (0, height % 2), (0, width % 2))
    pairs = [np.pad(batch[key].double().numpy(), pad, mode="reflect") for key in ("output", "target")]
    (low, high), (low_target, high_target) = (pywt.dwt2(x, "haar") for x in pairs)
    w = [1 + resized(x, low.shape[2:]) for x in (hf_map, lf_map)]
    hf = sum((np.abs(a - b) * w[0]).sum((1, 2, 3)) for a, b in zip(high, high_target, strict=True))
    close(found["hf"], hf / (9 * w[0].sum((1, 2, 3))))
    space = (np.abs(low - low_target) * w[1]).sum((1, 2, 3)) / (3 * w[1].sum((1, 2, 3)))
    amplitudes = [np.abs(np.fft.rfft2(x, norm="ortho")) for x in (low, low_target)]
    close(found["lf"], space + np.abs(amplitudes[0] - amplitudes[1]).mean((1, 2, 3)))


def test_frequency_maps_weigh_places_and_constant_maps_do_nothing():
    batch = sample()
    output, target = batch["output"], batch["target"]
    plain = losses.frequency(output, target)
    for level in (0, 0.3, 1):
        level = torch.full((B, 1, 7, 9), float(level))
        for name, value in losses.frequency(output, target, level, level).items():
            torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-7)
    left, here, there = torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    left[..., :16] = 1
    here[..., 8, 8], there[..., 8, 24] = 1, 1  # the same error, once where the map is 1
    for name in ("hf", "lf"):
        one, other = (losses.frequency(x, torch.zeros_like(x), left, left)[name] for x in (here, there))
        amplitude = losses.frequency(here, here.roll(16, 3))["lf"] - losses.frequency(here, here.roll(16, 3), left)["lf"]
        assert float(amplitude) == 0  # rolling changes no amplitude, and the high bands' map does not reach the low one
        assert one > other
    shifted = losses.frequency(there, here, lf_weight=left)["lf"]  # all that is left is the difference in space
    assert float(shifted) == pytest.approx((2 + 1) * 0.5 / (1.5 * 16 * 16), rel=1e-5)


def test_feature_alignment():
    gates, masks = draw(B, 16, 19, 23), draw(B, K, 7, 30)
    mine, theirs = (resized(x, (7, 8)).reshape(B, -1, 56) for x in (gates, masks))
    truth = []
    for pair in zip(mine, theirs, strict=True):
        a, b = ((x - x.mean(1, keepdims=True)).T @ (x - x.mean(1, keepdims=True)) for x in pair)
        truth.append(1 - (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    close(losses.feature_alignment(gates, masks), np.array(truth))


def test_feature_alignment_sees_what_masks_that_add_up_to_one_say():
    """Their mean over the channels is constant everywhere and says nothing."""
    masks = (6 * draw(B, K, 8, 8)).softmax(1)
    assert float(masks.mean(1).std()) < 1e-6
    same = 0.1 + 0.5 * masks[:, torch.randperm(K, generator=torch.Generator().manual_seed(0))].repeat(1, 3, 1, 1)
    torch.testing.assert_close(losses.feature_alignment(same, masks), torch.zeros(B), rtol=0, atol=2e-6)
    assert losses.feature_alignment(same.flip(2), masks).min() > 0.3
    assert losses.feature_alignment(0.7 + 1e-4 * same, masks).min() > 0.999  # far below the step of stored masks


def test_feature_alignment_learns_nothing_from_a_constant_teacher():
    gates = draw(B, 16, 19, 23).requires_grad_()
    losses.feature_alignment(gates, torch.full((B, K, 9, 14), 0.1)).sum().backward()
    assert gates.grad.abs().max() < 1e-9


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_degradation_kl(temperature):
    batch = sample()
    probs = batch["probs"].double().numpy()
    teacher = probs ** (1 / temperature) / (probs ** (1 / temperature)).sum(1, keepdims=True)
    student = np.exp(batch["logits"].double().numpy() / temperature)
    student /= student.sum(1, keepdims=True)
    truth = (teacher * np.log(teacher / student)).sum(1) * temperature**2
    for factor in (1, 7):  # probabilities that do not add up to one
        found = losses.degradation_kl(batch["logits"], factor * batch["probs"], batch["confidence"], temperature)
        np.testing.assert_allclose(found, truth * batch["confidence"].numpy(), rtol=1e-4, atol=1e-4)
    perfect = losses.degradation_kl(batch["probs"].log() + 5, batch["probs"], temperature=temperature)
    torch.testing.assert_close(perfect, torch.zeros(B), rtol=0, atol=1e-5)
    certain = losses.degradation_kl(torch.zeros(1, K), torch.eye(K)[:1])
    assert float(certain) == pytest.approx(math.log(K), rel=1e-3)


@pytest.mark.parametrize("grid", [(5, 6), (3, 20), (40, 40)])
def test_mask_loss(grid):
    masks = draw(B, K, *grid)
    logits = sample()["mask_logits"]
    m, p = resized(masks, (5, 6)), 1 / (1 + np.exp(-logits.double().numpy()))
    close(losses.mask_loss(logits, masks), (m * np.log(m / p) + (1 - m) * np.log((1 - m) / (1 - p))).mean((1, 2, 3)))
    hard = torch.ones(B, K, 5, 6).tril()  # the entropy of certain masks is 0, not nan
    assert losses.mask_loss(100 * (hard - 0.5), hard).max() < 1e-6
    assert losses.resize_masks(torch.ones(1, 1, 2, 2), (11, 11)).max() > 1  # by rounding, and 1 - mask has no logarithm
    assert losses.mask_loss(torch.full((1, 1, 11, 11), 50.0), torch.ones(1, 1, 2, 2)).max() < 1e-6


def test_code_loss():
    batch = sample()
    a, b = batch["prediction"].double().numpy(), batch["code"].double().numpy()
    truth = 1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    close(losses.code_loss(batch["prediction"], batch["code"]), truth)


# ---------------------------------------------------------------------------------------------------------------------
# perceptual

LAYERS = ("relu2_2", "relu3_4")


@pytest.fixture(scope="module")
def reference() -> nn.Sequential:
    """torchvision's VGG19 up to relu3_4, with drawn weights."""
    with torch.device("meta"):
        features = torchvision.models.vgg19(weights=None).features[:18]
    features = features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in features.parameters():
        nn.init.kaiming_normal_(weight, generator=generator) if weight.dim() == 4 else weight.detach().fill_(0.1)
    return features.requires_grad_(False)


@pytest.fixture(scope="module")
def weights(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    state = {f"features.{key}": value for key, value in reference.state_dict().items()}
    torch.save(state | {"features.34.bias": torch.zeros(512), "classifier.6.bias": torch.zeros(1000)}, path)
    return path


def test_names_are_those_layers_of_torchvision():
    with torch.device("meta"):
        theirs, mine = torchvision.models.vgg19(weights=None).features, losses.vgg19()
    block, counts, names = 1, {"conv": 0, "relu": 0}, []
    for layer in theirs:
        kind = {"Conv2d": "conv", "ReLU": "relu", "MaxPool2d": "pool"}[type(layer).__name__]
        if kind == "pool":
            names.append(f"pool{block}")
            block, counts = block + 1, {"conv": 0, "relu": 0}
        else:
            counts[kind] += 1
            names.append(f"{kind}{block}_{counts[kind]}")
    assert names == [name for name, _ in mine] and names.index("relu3_4") == 17 and names.index("relu2_2") == 8
    assert [str(layer) for layer in theirs] == [str(layer) for _, layer in mine]


def test_perceptual_compares_those_features(reference, weights):
    before = torch.get_rng_state()
    module = losses.Perceptual(LAYERS, weights).train()
    assert torch.equal(torch.get_rng_state(), before)  # the student's weights do not depend on this loss
    # 9 of 18 layers up to relu2_2: nothing beyond the last named one is held or run
    assert [len(losses.Perceptual(names, weights).features) for names in (LAYERS, LAYERS[:1])] == [18, 9]
    assert sum(p.numel() for p in module.parameters()) == 2_325_568
    batch = sample()
    normalise = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    truth = torch.zeros(B)
    for stop, mine in zip((9, 18), module.extract(batch["output"]), strict=True):
        theirs = [reference[:stop](normalise(batch[key])) for key in ("output", "target")]
        torch.testing.assert_close(mine, theirs[0], rtol=1e-4, atol=1e-4)
        truth += (theirs[0] - theirs[1]).abs().mean((1, 2, 3)) / 2
    torch.testing.assert_close(module(batch["output"], batch["target"]), truth, rtol=1e-4, atol=1e-5)
    alone = [module(batch["output"][i : i + 1], batch["target"][i : i + 1]) for i in range(B)]
    torch.testing.assert_close(torch.cat(alone), truth, rtol=1e-4, atol=1e-5)


def test_perceptual_teaches_the_output_alone(weights):
    module = losses.Perceptual(LAYERS, weights)
    output, target = (sample()[key].requires_grad_() for key in ("output", "target"))
    module(output, target).sum().backward()
    assert output.grad.abs().max() > 0 and target.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in module.parameters()) and not module.training
    same = target.detach().clone().requires_grad_()
    module(same, target).sum().backward()
    assert float(same.grad.abs().max()) == 0


def test_perceptual_under_autocast(weights):
    module, batch = losses.Perceptual(LAYERS, weights), sample()
    with torch.autocast("cpu", torch.bfloat16):
        value = module(batch["output"], batch["target"])
    exact = module(batch["output"], batch["target"])
    assert value.dtype == torch.float32 and not torch.equal(value, exact)  # it did run in half the precision
    large = [0, 2]  # sample 1 is at 51 dB, where bfloat16's rounding of the features shows: 20 %
    torch.testing.assert_close(value[large], exact[large], rtol=0.02, atol=0)


def test_perceptual_weights_from_safetensors_and_from_the_cache(weights, reference, tmp_path, monkeypatch):
    state = torch.load(weights, weights_only=True)
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "vgg19.safetensors")
    small = losses.Perceptual(LAYERS, tmp_path / "vgg19.safetensors")
    assert torch.equal(small.features[16].weight, reference[16].weight.half().float())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints" / torchvision.models.VGG19_Weights.DEFAULT.url.rpartition("/")[2]
    cache.parent.mkdir(parents=True)
    cache.write_bytes(weights.read_bytes())
    assert torch.equal(losses.Perceptual(LAYERS, "imagenet").features[16].weight, reference[16].weight)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a weights file has run code",))


def test_perceptual_mistakes_are_sentences(weights, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(UserError, match="no route.*--perceptual-weights PATH.*--perceptual-weight 0"):
        losses.Perceptual(LAYERS)
    with pytest.raises(UserError, match="--perceptual-layers conv1_1.*relu1_1"):
        losses.Perceptual(("relu2_2", "conv1_1"), weights)
    files = {"text.pth": b"text", "text.safetensors": b"text", "empty.pth": b"", "bomb.pth": pickle.dumps(Bomb(), 2)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in [*files, "missing.pth", "missing.safetensors"]:
        with pytest.raises(UserError, match=f"--perceptual-weights .*{name} cannot be read"):
            losses.Perceptual(LAYERS, tmp_path / name)
    state = torch.load(weights, weights_only=True)
    del state["features.16.bias"]
    for number, wrong in enumerate((state, state | {"features.16.bias": torch.zeros(3)}, [1, 2], {"state_dict": state})):
        torch.save(wrong, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match="holds no VGG19"):
            losses.Perceptual(LAYERS, tmp_path / f"{number}.pth")
