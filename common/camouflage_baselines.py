"""What can be had without a network on camouflaged objects: a colour threshold, and boosted trees on texture features.

Both learn on training pictures and are applied as they are to others. Each picture of the test is scored with its own
intersection over union, at its own size.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter
from sklearn.ensemble import HistGradientBoostingClassifier

Sample = tuple[np.ndarray, np.ndarray]  # image (H, W, 3) uint8, mask (H, W) bool
Predictor = Callable[[np.ndarray], np.ndarray]  # image -> mask (H, W) bool

PIXELS = 400  # of every training picture that the trees see
ORIENTATIONS = 4
WAVELENGTHS = (3.0, 5.0, 9.0)  # pixels


def iou(predicted: np.ndarray, mask: np.ndarray) -> float:
    """Intersection over union of two masks (H, W); 1 if both are empty."""
    union = (predicted | mask).sum()
    return float((predicted & mask).sum() / union) if union else 1.0


def _best_threshold(scores: Sequence[np.ndarray], masks: Sequence[np.ndarray], count: int = 64) -> tuple[float, float]:
    """The threshold with the highest mean IoU over pictures when `score >= threshold` is the object, and that mean."""
    candidates = np.unique(np.quantile(np.concatenate([s[::3, ::3].ravel() for s in scores]), np.linspace(0, 1, count + 2)))
    mean = np.zeros(len(candidates))
    for score, mask in zip(scores, masks, strict=True):
        above = np.searchsorted(candidates, score.ravel(), side="right")  # how many candidates this pixel reaches
        reached = np.bincount(above, minlength=len(candidates) + 1)[::-1].cumsum()[::-1][1:]
        hits = np.bincount(above[mask.ravel()], minlength=len(candidates) + 1)[::-1].cumsum()[::-1][1:]
        union = reached + mask.sum() - hits
        mean += np.where(union > 0, hits / np.maximum(union, 1), 1.0) / len(scores)
    best = int(mean.argmax())
    return float(candidates[best]), float(mean[best])


# ---------------------------------------------------------------------------------------------------------------------
# Colour


def colour_channels(image: np.ndarray) -> dict[str, np.ndarray]:
    """Brightness, colour and saliency of every pixel, (H, W) each."""
    rgb = image.astype(np.float32) / 255
    lab, hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB), cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    blurred = cv2.GaussianBlur(lab, (0, 0), 2.0)
    channels = {"red": rgb[..., 0], "green": rgb[..., 1], "blue": rgb[..., 2], "saturation": hsv[..., 1]}
    channels |= {"lightness": lab[..., 0], "green to red": lab[..., 1], "blue to yellow": lab[..., 2]}
    # Relative to the picture: how far a place's colour is from the mean colour, as a frequency-tuned saliency map has it.
    channels["saliency"] = np.linalg.norm(blurred - lab.mean((0, 1)), axis=-1)
    relative = (blurred - lab.mean((0, 1))) / (lab.std((0, 1)) + 1e-3)
    return channels | {f"relative {name}": relative[..., k] for k, name in enumerate(("lightness", "a", "b"))}


def colour_threshold(train: Sequence[Sample]) -> Predictor:
    """The one threshold on one channel, above or below, that is best on the training pictures."""
    channels = [colour_channels(image) for image, _ in train]
    masks = [mask for _, mask in train]
    best = (-1.0, "", 1, 0.0)
    for name in channels[0]:
        for sign in (1, -1):
            threshold, score = _best_threshold([sign * c[name] for c in channels], masks)
            best = max(best, (score, name, sign, threshold))
    _, name, sign, threshold = best
    return lambda image: sign * colour_channels(image)[name] >= threshold


# ---------------------------------------------------------------------------------------------------------------------
# Texture


def texture_features(image: np.ndarray) -> np.ndarray:
    """(H, W, features): oriented energy in three octaves, local statistics and how each differs from the picture's mean."""
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    light = lab[..., 0] / (lab[..., 0].std() + 1e-3)
    maps = []
    for wavelength in WAVELENGTHS:
        energies = []
        for k in range(ORIENTATIONS):
            side = int(2 * wavelength) | 1
            kernels = [
                cv2.getGaborKernel((side, side), wavelength / 2, np.pi * k / ORIENTATIONS, wavelength, 0.7, phase)
                for phase in (0, np.pi / 2)
            ]
            even, odd = (cv2.filter2D(light, -1, kernel - kernel.mean()) for kernel in kernels)
            energies.append(even**2 + odd**2)
        maps += energies
    maps += [light**2, (light - cv2.GaussianBlur(light, (0, 0), 1.0)) ** 2]
    features = []
    for sigma in (2.5, 6.0):
        smooth = [np.log(cv2.GaussianBlur(m, (0, 0), sigma) + 1e-4) for m in maps]
        features += [m - m.mean() for m in smooth]
    features += [cv2.GaussianBlur(lab[..., k], (0, 0), 3.0) - lab[..., k].mean() for k in range(3)]
    return np.stack(features, -1)


def boosted_texture(train: Sequence[Sample], seed: int) -> Predictor:
    """Boosted trees on pixels of four fifths of the training pictures; the other fifth chooses the threshold."""
    rng = np.random.default_rng([seed, len(train)])
    order = rng.permutation(len(train))
    held = max(1, len(train) // 5)
    rows, labels = [], []
    for index in order[held:]:
        image, mask = train[index]
        features = texture_features(image).reshape(mask.size, -1)
        chosen = rng.choice(mask.size, min(PIXELS, mask.size), replace=False)
        rows.append(features[chosen])
        labels.append(mask.ravel()[chosen])
    trees = HistGradientBoostingClassifier(max_iter=120, learning_rate=0.1, max_leaf_nodes=31, l2_regularization=1.0)
    trees.set_params(random_state=seed, early_stopping=False).fit(np.concatenate(rows), np.concatenate(labels))

    def score(image: np.ndarray) -> np.ndarray:
        features = texture_features(image)
        probability = trees.predict_proba(features.reshape(-1, features.shape[-1]))[:, 1]
        return gaussian_filter(probability.reshape(image.shape[:2]), 1.5)  # objects are not single pixels

    threshold, _ = _best_threshold([score(train[k][0]) for k in order[:held]], [train[k][1] for k in order[:held]])
    return lambda image: score(image) >= threshold


# ---------------------------------------------------------------------------------------------------------------------


def fit(train: Sequence[Sample], seed: int) -> dict[str, Predictor]:
    """Every baseline by its name, trained."""
    return {"colour threshold": colour_threshold(train), "boosted texture features": boosted_texture(train, seed)}


def fit_and_score(train: Sequence[Sample], test: Sequence[Sample], seed: int) -> dict[str, np.ndarray]:
    """(test,) IoU of every test picture, per baseline."""
    predictors = fit(train, seed)
    return {name: np.array([iou(predict(image), mask) for image, mask in test]) for name, predict in predictors.items()}
