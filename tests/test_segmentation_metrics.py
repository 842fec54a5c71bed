"""Metrics of object segmentation against pysodmetrics, and against what can be counted by hand."""

import warnings

import cv2
import numpy as np
import py_sod_metrics
import pytest
import torch
from scipy.ndimage import gaussian_filter

from common.cli import UserError
from common.restoration_report import write_csv
from common.segmentation_metrics import score, score_folders, summarize


class ExactSmeasure(py_sod_metrics.Smeasure):
    """Without pysodmetrics's rounding error in constant quadrants and its NaN in empty ones."""

    def ssim(self, pred, gt):
        if pred.size == 0:
            return 0.0
        constant = pred.min() == pred.max() and gt.min() == gt.max()
        return 1.0 if constant else super().ssim(pred, gt)


class Reference:
    def __init__(self, smeasure=py_sod_metrics.Smeasure):
        every = {"with_adaptive": True, "with_dynamic": True}
        binary = every | {"with_binary": True}
        self.meters = {
            "mae": py_sod_metrics.MAE(),
            "sm": smeasure(),
            "wfm": py_sod_metrics.WeightedFmeasure(),
            "em": py_sod_metrics.Emeasure(),
            "rest": py_sod_metrics.FmeasureV2(
                {
                    "fm": py_sod_metrics.FmeasureHandler(**every, beta=0.3),
                    "iou": py_sod_metrics.IOUHandler(**binary),
                    "dice": py_sod_metrics.DICEHandler(**binary),
                }
            ),
        }

    def step(self, prediction: np.ndarray, target: np.ndarray) -> None:
        for meter in self.meters.values():
            meter.step(prediction, target)

    def results(self) -> dict[str, float | np.ndarray]:
        found = {}
        for meter in self.meters.values():
            found |= meter.get_results()
        names = {"adp": "adp", "adaptive": "adp", "curve": "curve", "dynamic": "curve", "binary": "stretched"}
        for name in ("em", "fm", "iou", "dice"):
            for kind, value in found.pop(name).items():  # its curves begin at the threshold 255
                found[f"{name}_{names[kind]}"] = np.asarray(value)[::-1] if names[kind] == "curve" else value
        return found


def blob(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A soft map and a mask that agree roughly, as those of a network do."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.normal(size=(height, width)), max(1, min(height, width) / rng.uniform(6, 20)))
    field /= field.std() + 1e-9
    guess = field + rng.normal() * gaussian_filter(rng.normal(size=(height, width)), 2) * 2 - 1
    prediction = 255 / (1 + np.exp(-guess * rng.uniform(1, 20)))
    return prediction.round().astype(np.uint8), np.uint8(255) * (field > rng.uniform(0, 1.5))


def case(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, 7])
    height, width = rng.integers(5, 90, 2)
    prediction, target = blob(height, width, seed)
    if kind == "noise":  # object pixels everywhere, so that many pixels have several nearest ones
        low, high = rng.integers(0, 100), rng.integers(150, 256)
        prediction = rng.integers(low, high, target.shape).astype(np.uint8)
        target = np.uint8(255) * (rng.random(target.shape) < rng.random())
    if kind == "empty":
        target[:] = 0
    if kind == "full":
        target[:] = 255
    if kind == "zero":
        prediction[:] = 0
    if kind == "constant":
        prediction[:] = rng.integers(1, 255)
    if kind == "perfect":
        prediction = target.copy()
    if kind == "grey mask":  # resized masks: above 128 is object
        target = gaussian_filter(target, 2)
    if kind == "pixel":
        target[:] = 0
        target[rng.integers(height - 1), rng.integers(width - 1)] = 255
    if kind == "corner":  # the centroid lies on the last row and column
        target[:] = 0
        target[-1, -1] = 255
    return prediction, target


def alone(prediction: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    return {k: v[0].numpy() for k, v in score(torch.from_numpy(prediction)[None], torch.from_numpy(target)[None]).items()}


def assert_parity(prediction: np.ndarray, target: np.ndarray, smeasure=py_sod_metrics.Smeasure) -> None:
    reference = Reference(smeasure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.step(prediction, target)
        expected = reference.results()
    mine = alone(prediction, target)
    assert mine.keys() - expected.keys() == {"iou", "dice", "iou_saved_curve"}
    for name, value in expected.items():
        np.testing.assert_allclose(mine[name], value, rtol=0, atol=2e-7, err_msg=name)


KINDS = ["blob", "noise", "empty", "full", "zero", "perfect", "grey mask", "pixel"]


@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind):
    for seed in range(12):
        assert_parity(*case(kind, seed))


@pytest.mark.parametrize("kind", ["constant", "corner"])
def test_parity_where_pysodmetrics_depends_on_rounding(kind):
    for seed in range(12):
        assert_parity(*case(kind, seed), ExactSmeasure)


@pytest.mark.parametrize("size", [(1, 9), (7, 1), (2, 2), (3, 40)])
def test_parity_of_tiny_images(size):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        target = np.uint8(255) * (rng.random(size) < 0.5)
        assert_parity(rng.integers(0, 256, size, dtype=np.uint8), target, ExactSmeasure)


def test_parity_of_errors_far_from_the_object():
    prediction, target = np.zeros((2, 60, 700), np.uint8)
    target[20:40, 300:320] = 255
    prediction[22:44, 296:322] = 180
    for columns in (slice(385, 415), slice(440, 470), slice(670, 700), slice(0, 30)):  # 65, 120, 350, 270 pixels away
        prediction[10:50, columns] = 255
        assert_parity(prediction, target)


def test_a_set_is_averaged_as_in_pysodmetrics():
    reference, rows = Reference(), []
    for seed in range(5):
        prediction, target = case("blob", seed)
        reference.step(prediction, target)
        rows.append(alone(prediction, target))
    summary = summarize({"id": np.arange(5)} | {name: np.stack([row[name] for row in rows]) for name in rows[0]})
    for name, value in reference.results().items():
        if name.endswith("_curve"):
            name = name.removesuffix("_curve")
            assert summary.pop(f"{name}_max") == pytest.approx(value.max(), abs=1e-7)
            assert summary.pop(f"{name}_mean") == pytest.approx(value.mean(), abs=1e-7)
        else:
            assert summary.pop(name) == pytest.approx(value, abs=1e-7)
    assert summary.keys() == {"iou", "dice", "iou_saved_mean", "iou_saved_max"}


def test_the_maximum_is_of_the_mean_curve():
    curve = np.zeros((2, 256))
    curve[0, 10], curve[1, 20] = 1.0, 0.5
    summary = summarize({"id": np.arange(2), "fm_curve": curve, "mae": np.array([0.25, 0.75])})
    assert summary == {"fm_mean": 1.5 / 512, "fm_max": 0.5, "mae": 0.5}


def test_a_batch_is_its_images():
    cases = [blob(40, 56, seed) for seed in range(3)]
    cases += [(cases[0][0], np.zeros_like(cases[0][1])), (np.zeros_like(cases[1][0]), cases[1][1])]
    together = score(*(torch.from_numpy(np.stack(x)) for x in zip(*cases, strict=True)))
    for i, one in enumerate(cases):
        for name, value in alone(*one).items():
            assert together[name].dtype == torch.float64
            np.testing.assert_allclose(together[name][i].numpy(), value, rtol=0, atol=1e-12, err_msg=name)


def test_input_kinds():
    levels, mask = (torch.from_numpy(x)[None] for x in blob(30, 50, 0))
    expected = score(levels, mask)
    for prediction in (levels / 255, levels.double() / 255 + 0.4 / 255, levels / 255 - 0.4 / 255):
        for target in (mask, mask > 128):
            assert all(torch.equal(value, expected[name]) for name, value in score(prediction, target).items())
    # not contiguous, as a cropped and transposed batch is
    bent = score(torch.cat([levels, levels], 2)[:, :, :50].mT.contiguous().mT, torch.cat([mask, mask], 1)[:, :30])
    assert all(torch.equal(value, expected[name]) for name, value in bent.items())


def test_by_hand():
    prediction = np.array([[255, 255, 0, 0]] * 2, np.uint8)
    target = np.array([[255, 0, 0, 0]] * 2, np.uint8)
    found = alone(prediction, target)
    assert found["mae"] == 0.25
    for name in ("iou", "iou_adp", "iou_stretched"):
        assert found[name] == 0.5
    assert found["iou_curve"][0] == 0.25 and (found["iou_curve"][1:] == 0.5).all()
    assert found["dice"] == pytest.approx(2 / 3)
    precision, recall = 0.5, 1
    assert found["fm_adp"] == pytest.approx(1.3 * precision * recall / (0.3 * precision + recall))
    perfect = alone(target, target)
    for name in ("wfm", "sm", "fm_adp", "iou", "dice"):
        assert perfect[name] == pytest.approx(1, abs=1e-6), name
    assert perfect["em_adp"] == pytest.approx(8 / 7)  # the published divisor is the number of pixels less one


def test_iou_of_the_saved_and_of_the_stretched_map():
    target = np.array([[255, 255, 0, 0, 0]], np.uint8)
    faint = np.array([[100, 120, 10, 20, 90]], np.uint8)  # right in its order, below one half everywhere
    found = alone(faint, target)
    assert found["iou"] == found["dice"] == 0
    assert found["iou_stretched"] == 2 / 3  # 90 lies above the middle of 10 and 120
    edge = np.array([[128, 127, 127, 128, 0]], np.uint8)
    assert alone(edge, target)["iou"] == 1 / 3


def test_an_empty_mask_scores_nothing_but_error():
    target = np.zeros((20, 30), np.uint8)
    found = alone(target, target)
    assert found["wfm"] == found["iou"] == found["dice"] == found["fm_adp"] == 0
    assert found["mae"] == 0 and found["sm"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# folders


@pytest.fixture
def folders(tmp_path):
    """Five pairs, one of them a JPEG in colour, one in a folder below, one map of half the size; and an odd one out each."""
    maps, masks = tmp_path / "maps", tmp_path / "masks"
    for folder in (maps, masks / "more"):
        folder.mkdir(parents=True)
    for seed in range(5):
        prediction, target = blob(40, 56, seed)
        cv2.imwrite(str((masks / "more" if seed == 3 else masks) / f"image{seed}.png"), target)
        if seed == 1:
            prediction = prediction[::2, ::2]
        if seed == 2:
            cv2.imwrite(str(maps / "image2.jpg"), np.repeat(prediction[..., None], 3, 2))
        else:
            cv2.imwrite(str(maps / f"image{seed}.png"), prediction)
    cv2.imwrite(str(maps / "odd.png"), prediction)
    cv2.imwrite(str(masks / "lost.png"), target)
    return maps, masks


def test_folders(folders, caplog, tmp_path):
    table, names = score_folders(*folders, threads=2)
    assert names == [f"image{i}" for i in range(5)] and table["id"].tolist() == list(range(5))
    assert "1 of the images in" in caplog.text and "maps have no partner and are not scored: odd" in caplog.text
    assert "masks have no partner and are not scored: lost" in caplog.text
    assert "1 of 5 maps were resized" in caplog.text
    for i, name in enumerate(names):
        prediction = cv2.imread(str(folders[0] / (name + (".jpg" if i == 2 else ".png"))), cv2.IMREAD_GRAYSCALE)
        target = cv2.imread(str(folders[1] / ("more" if i == 3 else "") / f"{name}.png"), cv2.IMREAD_GRAYSCALE)
        prediction = cv2.resize(prediction, (56, 40), interpolation=cv2.INTER_LINEAR)
        for column, value in alone(prediction, target).items():
            np.testing.assert_array_equal(table[column][i], value, err_msg=f"{name} {column}")
    write_csv(tmp_path / "scores.csv", names, table)
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert len(lines) == 6 and lines[1].startswith("image0,")
    columns = lines[0].split(",")
    assert {"wfm", "iou", "fm_adp", "em_adp"} < set(columns) and not any("curve" in column for column in columns)
    assert float(lines[2].split(",")[columns.index("fm_adp")]) == pytest.approx(table["fm_adp"][1], rel=1e-5)


def test_folders_without_a_pair(folders, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"nothing \(0 images\) is named like one below .*masks \(6 images\)"):
        score_folders(tmp_path / "nothing", folders[1], threads=1)


def test_two_files_of_one_name(folders):
    cv2.imwrite(str(folders[1] / "image3.png"), np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match="image3.png have one name"):
        score_folders(*folders, threads=1)


def test_masks_of_ones(folders):
    cv2.imwrite(str(folders[1] / "image0.png"), np.eye(40, 56, dtype=np.uint8))
    with pytest.raises(UserError, match="image0.png: no value is above 128"):
        score_folders(*folders, threads=1)


def test_damaged_map(folders):
    path = folders[0] / "image0.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="image0.png cannot be read"):
        score_folders(*folders, threads=2)


def test_the_curve_of_the_map_as_saved_is_what_a_user_of_a_threshold_gets():
    """On stretched maps 0.5 finds the object, on the saved map nothing reaches it."""
    map_ = torch.full((1, 20, 20), 0.05)
    map_[:, 2:8, 2:8], map_[:, 12:16, 12:16] = 0.35, 0.20
    mask = torch.zeros(1, 20, 20, dtype=torch.bool)
    mask[:, 2:8, 2:8] = True
    curve = score(map_, mask)["iou_saved_curve"][0]
    for level in (0, 30, 60, 89, 90, 128):
        found = (map_ * 255).round() >= level
        expected = (found & mask).sum() / (found | mask).sum()
        assert curve[level].item() == pytest.approx(expected.item(), abs=1e-7)
    assert curve[128] == 0 and curve.max() == 1
