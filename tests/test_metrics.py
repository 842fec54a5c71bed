"""Metrics against scikit-learn, scikit-image and SciPy, and against their definitions written out slowly."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import trim_mean
from skimage.color import rgb2hsv, rgb2lab, rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

from common import metrics
from common.metrics import NR_VARIANTS, auc, calibration, confusion, psnr, ssim, uciqe, uicm, uiconm, uiqm, uism, weighted_f1


@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    target, answer = rng.integers(0, 4, 200), rng.integers(0, 5, 200)
    counts = confusion(target, answer, 6)
    assert np.array_equal(counts, confusion_matrix(target, answer, labels=range(6)))
    assert weighted_f1(counts) == pytest.approx(
        f1_score(target, answer, average="weighted", labels=range(6), zero_division=0), abs=1e-12
    )
    binary, score = rng.integers(0, 2, 200), rng.integers(0, 9, 200) / 9  # many ties
    assert auc(binary, score) == pytest.approx(roc_auc_score(binary, score), abs=1e-12)


def test_auc_of_one_class_is_not_a_number():
    assert np.isnan(auc(np.ones(3), np.arange(3)))


def test_calibration():
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    error, table = calibration(np.array([1, 1, 1, 0]), confidence)
    assert error == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)
    assert table[9].tolist() == pytest.approx([0.95, 1.0, 0.5]) and table[5].tolist() == pytest.approx([0.55, 0.5, 0.5])
    assert calibration(np.ones(4), np.ones(4))[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# images beside a reference


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int, kind: int = 0) -> np.ndarray:
    """Waves with flat and saturated regions, and no random numbers: also the images of the regression table."""
    y, x = np.mgrid[:height, :width] / 16
    waves = [np.sin(x * (c + 1) / 2 + kind) * np.cos(y - c * kind) for c in range(3)]
    return np.clip(np.stack(waves, -1) * (90, 70, 150)[kind] + (20, 90, 128), 0, 255).astype(np.uint8)


def tensor(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def distorted(image: np.ndarray, seed: int = 1, sigma: float = 12) -> np.ndarray:
    return np.clip(image + np.random.default_rng(seed).normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


def reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    return structural_similarity(
        a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )


PAIRS = [
    (noise(31, 45), noise(31, 45, 1)),
    (smooth(40, 37), distorted(smooth(40, 37))),
    (smooth(64, 48, 1), smooth(64, 48, 1) // 2),
    (smooth(11, 11), distorted(smooth(11, 11), sigma=2)),
]


@pytest.mark.parametrize("a, b", PAIRS)
def test_psnr_and_ssim_against_scikit_image(a, b):
    for x, y in ((tensor(a), tensor(b)), (tensor(a) / 255, tensor(b) / 255)):
        assert psnr(x, y).item() == pytest.approx(peak_signal_noise_ratio(a, b), rel=1e-6)
        assert ssim(x, y).item() == pytest.approx(reference_ssim(a, b), abs=1e-5)
    one = reference_ssim(a[..., 1:2], b[..., 1:2])
    assert ssim(tensor(a)[:, 1:2], tensor(b)[:, 1:2]).item() == pytest.approx(one, abs=1e-5)


def test_to_uint8_clamps_and_rounds():
    levels = metrics.to_uint8(torch.tensor([-0.1, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.2]))
    assert levels.dtype == torch.uint8 and levels.tolist() == [0, 0, 1, 255, 255]


def test_equal_images():
    x = tensor(smooth(20, 20))
    assert psnr(x, x).item() == 100 and ssim(x, x).item() == pytest.approx(1, abs=1e-6)
    assert psnr(x, x - x).isfinite() and ssim(x - x, x - x + 255).isfinite()


def test_ssim_is_a_loss():
    a, b = (torch.from_numpy(i).permute(2, 0, 1)[None].float() / 255 for i in PAIRS[1])
    x = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ssim(x, b).sum(), x)
    step = 0.02 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    slope = (ssim(a + step / 10, b) - ssim(a - step / 10, b)).item() * 5
    assert (gradient * step).sum().item() == pytest.approx(slope, rel=0.02)
    for flat in (a, torch.zeros_like(a)):  # equal images: the maximum, so the gradient vanishes
        x = flat.clone().requires_grad_()
        (at_maximum,) = torch.autograd.grad(ssim(x, flat).sum(), x)
        assert at_maximum.isfinite().all() and at_maximum.abs().max() < 1e-3 * gradient.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ssim_under_autocast(dtype):
    a, b = (tensor(i) / 255 for i in PAIRS[1])
    with torch.autocast("cpu", dtype=dtype):
        value = ssim(a, b)
    assert value.dtype == torch.float32 and torch.equal(value, ssim(a, b))


def test_ssim_names_what_does_not_fit():
    with pytest.raises(ValueError, match="11 x 11 pixels does not fit into an image of 40 x 10"):
        ssim(torch.zeros(1, 3, 10, 40), torch.zeros(1, 3, 10, 40))


def test_colours_against_scikit_image():
    corners = np.array(np.meshgrid([0, 255], [0, 255], [0, 255]), dtype=np.uint8).reshape(3, 8).T.reshape(2, 4, 3)
    for image in (noise(20, 30), smooth(20, 30), corners):
        y = metrics.luminance(tensor(image))[0, 0].numpy()
        assert y == pytest.approx(rgb2ycbcr(image)[..., 0] / 255, abs=1e-6)
        lab = metrics.rgb_to_lab(tensor(image))[0].permute(1, 2, 0).numpy()
        assert lab == pytest.approx(rgb2lab(image), abs=0.01)  # its white differs from the matrix's in the fifth digit


def test_fidelity_has_the_conventions_of_the_literature():
    target, output = smooth(300, 280), distorted(smooth(300, 280))
    x, y = tensor(output) / 255, tensor(target) / 255
    scores = {name: value.item() for name, value in metrics.fidelity(x, y).items()}
    assert scores["psnr"] == pytest.approx(peak_signal_noise_ratio(target, output), rel=1e-6)
    assert scores["ssim"] == pytest.approx(reference_ssim(target, output), abs=1e-5)
    grey = [rgb2ycbcr(i)[..., :1] for i in (target, output)]
    assert scores["psnr_y"] == pytest.approx(peak_signal_noise_ratio(*grey, data_range=255), rel=1e-6)
    assert scores["ssim_y"] == pytest.approx(reference_ssim(*grey), abs=1e-5)
    small = [np.array(Image.fromarray(i).resize((256, 256), Image.BILINEAR)) for i in (target, output)]
    assert scores["psnr_256"] == pytest.approx(peak_signal_noise_ratio(*small), abs=0.05)
    assert scores["ssim_256"] == pytest.approx(reference_ssim(*small), abs=2e-3)
    assert metrics.resize_256(x)[0].permute(1, 2, 0).numpy() * 255 == pytest.approx(small[1].astype(float), abs=1)
    hidden = metrics.fidelity(x + 0.3 / 255, y)  # less than half a level: the file would be the same
    assert {name: value.item() for name, value in hidden.items()} == scores


def test_grey_world_removes_a_cast():
    scene = np.clip(noise(16, 16), 0, 200) / 255
    scene = torch.from_numpy(scene / scene.mean((0, 1)) * 0.4).permute(2, 0, 1)[None].clamp(0, 0.9)
    cast = scene * torch.tensor([0.4, 0.9, 1.0]).view(3, 1, 1)
    means = metrics.grey_world(cast).mean((2, 3))
    assert means[0].numpy() == pytest.approx(cast.mean().item(), rel=1e-3)
    black = metrics.grey_world(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert black.dtype == torch.float32 and not black.any()


# ---------------------------------------------------------------------------------------------------------------------
# images without a reference: each variant once more, from its description, with loops


def slow_uicm(image: np.ndarray, variant: str) -> float:
    r, g, b = np.moveaxis(image.astype(float), -1, 0)
    means, variances = [], []
    for x in (r - g, (r + g) / 2 - b):
        x = np.sort(x.ravel())
        k = len(x)
        if variant == "matlab":
            inner, n = x[math.floor(k / 10 + 1.5) - 1 : math.floor(9 * k / 10 + 0.5)], 0.8 * k
        else:
            left, right = math.ceil(k / 10), math.floor(k / 10)
            inner, n = x[left + (variant == "funie") : k - right], k - left - right
        means.append(inner.sum() / n)
        variances.append(np.mean((x - means[-1]) ** 2) if variant == "funie" else ((inner - means[-1]) ** 2).sum() / n)
    return -0.0268 * math.hypot(*means) + 0.1586 * math.sqrt(sum(variances))


def slow_stretch(x: np.ndarray, size: int) -> np.ndarray:
    def kernel(d: float) -> float:
        d = abs(d)
        if d <= 1:
            return 1.5 * d**3 - 2.5 * d**2 + 1
        return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0

    mirrored, rows = np.pad(x, ((3, 3), (0, 0)), "symmetric"), []
    for i in range(size):
        at = (i + 0.5) * len(x) / size - 0.5
        near = range(math.floor(at) - 1, math.floor(at) + 3)
        rows.append(sum(kernel(at - j) * mirrored[j + 3] for j in near))
    return np.array(rows)


def slow_matlab_size(x: np.ndarray) -> np.ndarray:
    h, w = x.shape
    if h % 5 or w % 5:
        x = slow_stretch(slow_stretch(x, h - h % 5 + 5).T, w - w % 5 + 5).T
    return x


def blocks(x: np.ndarray, size: int, rows: int, columns: int) -> list[np.ndarray]:
    return [x[i * size :, j * size :][:size, :size] for i in range(rows) for j in range(columns)]


def slow_uism(image: np.ndarray, variant: str) -> float:
    total = 0.0
    for c, weight in enumerate((0.299, 0.587, 0.144 if variant == "funie" else 0.114)):
        x = image[..., c].astype(float)
        h, w = x.shape
        p = np.pad(x, 1, "edge")
        down, right = np.zeros((h, w)), np.zeros((h, w))
        for i in range(3):
            for j in range(3):
                part = p[i : i + h, j : j + w]
                down += (i - 1) * (2 - abs(j - 1)) * part
                right += (j - 1) * (2 - abs(i - 1)) * part
        if variant == "matlab":
            edges = blocks(slow_matlab_size(np.abs(down - right)), 5, math.ceil(h / 5), math.ceil(w / 5))
            logs = [np.log(complex(b.max() / b.min())) for b in edges if b.max() != 0 and b.min() != 0]
            total += weight * abs(sum(logs)) * 2 / (h / 5 * w / 5)
            continue
        edges = np.hypot(down, right)
        if variant == "funie" and edges.max() > 0:
            edges = edges * (255 / edges.max())
        n = h // 10 * (w // 10)
        logs = [math.log(b.max() / b.min()) for b in blocks(edges * x, 10, h // 10, w // 10) if b.min() > 0]
        total += weight * 2 / n * sum(logs)
    return total


def slow_uiconm(image: np.ndarray, variant: str) -> float:
    h, w, _ = image.shape
    total = 0.0
    if variant == "matlab":
        for c in range(3):
            x = slow_matlab_size(image[..., c].astype(float))
            cut = blocks(x, 5, x.shape[0] // 5, x.shape[1] // 5)
            ratios = [(b.max() - b.min()) / (b.max() + b.min()) for b in cut if b.max() != b.min()]
            total += abs(sum(m * np.log(complex(m)) for m in ratios)) / len(cut)
        return total
    x = image.astype(float) if variant == "funie" else image @ np.array([0.299, 0.587, 0.114])
    cut = blocks(x, 10, h // 10, w // 10)
    for b in cut:
        low, high = b.min(), b.max()
        if low == high:
            continue
        if variant == "funie":
            m = (high - low) / (high + low)
        else:
            dark, bright = 1026 - low, 1026 - high  # grey tones
            m = 1026 * (dark - bright) / (1026 - bright) / (dark + bright - dark * bright / 1026)
        total -= m * math.log(m) / len(cut)
    return total


def slow_uiqm(image: np.ndarray, variant: str) -> float:
    parts = slow_uicm(image, variant), slow_uism(image, variant), slow_uiconm(image, variant)
    return 0.0282 * parts[0] + 0.2953 * parts[1] + 3.5753 * parts[2]


def slow_uciqe(image: np.ndarray, variant: str) -> float:
    k = image.shape[0] * image.shape[1]
    if variant == "funie":
        hue, saturation, value = np.moveaxis(rgb2hsv(image), -1, 0)
        value, n = np.sort(value.ravel()), max(k // 100, 1)
        spread, contrast = hue.std(), value[-n:].mean() - value[:n].mean()
        return 0.4680 * spread + 0.2745 * contrast + 0.2576 * saturation.mean()
    lightness, a, b = (x.ravel() for x in np.moveaxis(rgb2lab(image), -1, 0))
    if variant == "paper":
        chroma, ordered = np.hypot(a, b), np.sort(lightness)
        spread, contrast = chroma.std() / 100, (ordered[k - 1 - k // 100] - ordered[k // 100]) / 100
        saturation = np.mean(chroma / np.maximum(np.hypot(chroma, lightness), 1e-6))
    else:
        lightness, a, b = np.round(lightness * 2.55) / 255, np.round(a + 128) / 255, np.round(b + 128) / 255
        chroma = np.hypot(a, b)
        below = np.cumsum(np.histogram(lightness * 255, 256, (-0.5, 255.5))[0])
        low, high = np.nonzero(below > 0.01 * k)[0][0], np.nonzero(below >= 0.99 * k)[0][0]
        spread = math.sqrt(np.mean(np.abs(1 - (chroma.mean() / chroma) ** 2)))
        contrast = 1.0 if low == high else (high - low) / 255
        saturation = np.mean(chroma / np.hypot(chroma, lightness))
    return 0.4680 * spread + 0.2745 * contrast + 0.2576 * saturation


IMAGES = [noise(47, 61), noise(50, 43, 1), smooth(47, 61), smooth(60, 45, 1), smooth(53, 40, 2), noise(10, 10)]


@pytest.mark.parametrize("variant", NR_VARIANTS)
@pytest.mark.parametrize("image", IMAGES, ids=lambda i: "x".join(map(str, i.shape)))
def test_uiqm_and_uciqe_against_loops(image, variant):
    x = tensor(image)
    for fast, slow in ((uicm, slow_uicm), (uism, slow_uism), (uiconm, slow_uiconm), (uiqm, slow_uiqm)):
        assert fast(x, variant).item() == pytest.approx(slow(image, variant), rel=1e-4, abs=1e-5)
    assert uciqe(x, variant).item() == pytest.approx(slow_uciqe(image, variant), rel=1e-4, abs=5e-5)


TABLE = {  # (UIQM, UCIQE) of three images, by the slow code above
    "paper": [
        (1.8106, 0.4545),
        (1.844, 0.3863),
        (1.9688, 0.5304),
    ],
    "funie": [
        (1.1518, 0.4673),
        (1.1234, 0.3871),
        (1.2257, 0.5468),
    ],
    "matlab": [
        (3.6422, 0.5656),
        (2.7767, 0.4841),
        (3.3326, 0.5921),
    ],
}


@pytest.mark.parametrize("variant", NR_VARIANTS)
def test_regression(variant):
    """What was measured when the variants were written: a change of these numbers is a change of the metric."""
    x = tensor(*(smooth(64, 80, kind) for kind in range(3)))
    measured = list(zip(uiqm(x, variant).tolist(), uciqe(x, variant).tolist(), strict=True))
    assert np.array(measured) == pytest.approx(np.array(TABLE[variant]), abs=2e-4)


def test_uicm_of_the_papers_table():
    moments = map(torch.tensor, (0.7896, 0.8901, 23.9203**2, 19.9269**2))
    assert metrics.uicm_of(*moments).item() == pytest.approx(4.9058, abs=5e-5)


def test_trimming():
    rng = np.random.default_rng(0)
    levels = rng.integers(-255, 256, (3, 25, 40))
    for variant in ("paper", "matlab"):
        mean, _ = metrics._trimmed_moments(torch.from_numpy(levels), 255, variant)
        assert mean.numpy() == pytest.approx(trim_mean(levels.reshape(3, -1), 0.1, axis=1), rel=1e-5)
    ten = torch.tensor([[9, 0, 3, 1, 2, 8, 4, 7, 5, 6]])
    assert [m.item() for m in metrics._trimmed_moments(ten, 9, "paper")] == [4.5, 5.25]
    mean, variance = metrics._trimmed_moments(ten, 9, "funie")  # (2 + ... + 8) / 8, and all ten about it
    assert mean.item() == 35 / 8 and variance.item() == pytest.approx(sum((i - 35 / 8) ** 2 for i in range(10)) / 10)


def test_contrast_of_one_block_by_hand():
    block = torch.full((1, 3, 10, 10), 100, dtype=torch.uint8)
    block[..., 3, 4] = 150
    assert uiconm(block, "funie").item() == pytest.approx(-0.2 * math.log(0.2))
    assert uiconm(block, "matlab").item() == pytest.approx(-3 / 4 * 0.2 * math.log(0.2), rel=1e-6)
    m = (50 / 150) / (1 - 100 * 150 / 1026**2)
    assert uiconm(block, "paper").item() == pytest.approx(-m * math.log(m), rel=1e-5)


@pytest.mark.parametrize("variant", NR_VARIANTS)
def test_each_image_is_on_its_own(variant):
    a, b = tensor(*(smooth(43, 57, k) for k in range(3))), tensor(*(noise(43, 57, k) for k in range(3)))
    for metric in (uicm, uism, uiconm, uiqm, uciqe):
        batch = metric(a, variant)
        assert batch.shape == (3,) and batch.dtype == torch.float32
        assert batch.numpy() == pytest.approx([metric(x[None], variant).item() for x in a], rel=1e-6)
        assert torch.equal(metric(a.float() / 255, variant), batch)
    batch = metrics.fidelity(a, b)
    for i in range(3):
        for name, value in metrics.fidelity(a[i : i + 1], b[i : i + 1]).items():
            assert value.item() == pytest.approx(batch[name][i].item(), rel=1e-5)


@pytest.mark.parametrize("variant", NR_VARIANTS)
def test_turning_an_image(variant):
    x = tensor(smooth(60, 40, 1), distorted(smooth(60, 40)))
    turned = {"half": x.flip(2, 3), "transposed": x.transpose(2, 3), "mirrored": x.flip(3), "quarter": x.rot90(1, (2, 3))}
    same = {
        name: torch.allclose(uiqm(y, variant), uiqm(x, variant), rtol=1e-5)
        and torch.allclose(uciqe(y, variant), uciqe(x, variant), rtol=1e-5)
        for name, y in turned.items()
    }
    with_sign = variant == "matlab"  # |vertical - horizontal| becomes |vertical + horizontal| in a mirror
    assert same == {"half": True, "transposed": True, "mirrored": not with_sign, "quarter": not with_sign}


@pytest.mark.parametrize("variant", NR_VARIANTS)
def test_grey_and_flat_images(variant):
    grey = tensor(np.repeat(smooth(64, 64)[..., 1:2], 3, -1))
    assert uicm(grey, variant).item() == 0
    if variant != "matlab":
        value = np.sort(grey[0, 0].numpy().ravel())
        bright, dark = (rgb2lab(np.full((1, 1, 3), value[i], np.uint8))[0, 0, 0] / 100 for i in (-41, 40))
        if variant == "funie":
            bright, dark = value[-40:].mean() / 255, value[:40].mean() / 255
        assert uciqe(grey, variant).item() == pytest.approx(0.2745 * (bright - dark), abs=1e-5)
    colours = torch.tensor([[0, 0, 0], [128, 128, 128], [255, 255, 255], [255, 0, 0], [3, 90, 200]], dtype=torch.uint8)
    flat = colours[:, :, None, None].expand(-1, -1, 33, 32)
    assert uism(flat, variant).abs().max() == 0
    assert uiconm(flat[:3], variant).abs().max() < 1e-6  # funie takes the contrast between the channels of a colour too
    assert uiqm(flat, variant).isfinite().all() and uciqe(flat, variant).isfinite().all()
    if variant == "matlab":
        assert uciqe(flat, variant)[1].item() == pytest.approx(0.480, abs=5e-4)  # the defect: a grey card scores half


def test_nr_metrics_name_what_is_wrong():
    with pytest.raises(ValueError, match="no variant 'hsv'"):
        uciqe(torch.zeros(1, 3, 20, 20), "hsv")
    with pytest.raises(ValueError, match="at least 10 x 10 pixels, not 20 x 9"):
        uiqm(torch.zeros(1, 3, 9, 20), "paper")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    a, b = tensor(smooth(43, 57), smooth(43, 57, 1)), tensor(noise(43, 57), distorted(smooth(43, 57, 1)))
    for metric in (uiqm, uciqe):
        for variant in NR_VARIANTS:
            assert metric(b.cuda(), variant).cpu().numpy() == pytest.approx(metric(b, variant).numpy(), rel=1e-4)
    on_gpu = metrics.fidelity(a.cuda(), b.cuda())
    for name, value in metrics.fidelity(a, b).items():
        assert on_gpu[name].cpu().numpy() == pytest.approx(value.numpy(), rel=1e-4)
