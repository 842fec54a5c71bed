"""timm's backbones: their feature maps, sentences for what cannot be had, and their parts, to thaw one after another."""

import difflib
import math
from pathlib import Path

import timm
from torch import nn

from common.cli import UserError
from common.losses import fill, read_weights


def norm(width: int) -> nn.GroupNorm:
    """Not batch normalization: its statistics would depend on the batch per process."""
    return nn.GroupNorm(math.gcd(8, width), width)


def make_backbone(name: str, weights: str, *, scratch: bool) -> nn.Module:
    """A timm model's feature maps. Sentences for an unknown name and for weights that cannot be had.

    From scratch, batch normalization becomes group normalization, which does not depend on the batch per process; with
    pretrained weights its statistics stay what they are."""
    file = weights if weights not in ("timm", "none") else None
    if file and not Path(file).is_file():
        raise UserError(f"--backbone-weights {file} is no file: give timm, none, or a file with the backbone's weights.")
    if name.split(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        raise UserError(f"--backbone {name} is unknown to timm {timm.__version__}. Near names: {', '.join(near) or 'none'}.")
    try:
        backbone = timm.create_model(name, features_only=True, pretrained=weights == "timm")
    except (RuntimeError, OSError) as error:
        if weights != "timm":
            raise UserError(f"--backbone {name} gives no feature maps ({str(error)[:200]}): choose another.") from None
        raise UserError(
            f"The weights of --backbone {name} cannot be loaded ({type(error).__name__}: {str(error)[:200]}). Without a"
            " network pass --backbone-weights FILE, or none to train from scratch."
        ) from None
    if file:
        said = f"--backbone-weights {file}"
        fill(backbone, read_weights(file, said, f"timm's weights of {name}"), said, f"timm's {name}")
    if len(set(backbone.feature_info.reduction())) < 3:
        raise UserError(f"--backbone {name} has feature maps of fewer than three sizes: choose another.")
    return group_normalized(backbone) if scratch else backbone


def group_normalized(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            act = [child.act] if isinstance(getattr(child, "act", None), nn.Module) else []  # timm joins norm and activation
            setattr(module, name, nn.Sequential(norm(child.num_features), *act))
        else:
            group_normalized(child)
    return module


def parts_of(backbone: nn.Module) -> list[tuple[str, list[nn.Parameter]]]:
    """The backbone's parts with parameters, in the order of the forward pass."""
    inner = backbone
    while len(children := [c for c in inner.children() if any(True for _ in c.parameters())]) == 1:
        inner = children[0]
    found = [(name, list(child.parameters())) for name, child in inner.named_children()]
    loose = [(name, [p]) for name, p in inner.named_parameters(recurse=False)]
    return loose + [(name, parameters) for name, parameters in found if parameters]


def thaw(backbone: nn.Module, count: int) -> None:
    """The last `count` parts train, the others do not."""
    parts = parts_of(backbone)
    for number, (_, parameters) in enumerate(parts):
        for parameter in parameters:
            parameter.requires_grad_(number >= len(parts) - count)
