"""Class activation maps: the channels of a late layer, weighted by what they do for a class, one function a method.

Where they look is told in `activations.places`. In a transformer the places are the patch tokens that enter the last block's
attention (its `norm1`): after it a class token is all that counts, and the gradient at the patches is zero. In hierarchical
and convolutional models they are the last stage's output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..score import Target
from .activations import places


def grad_cam(model: nn.Module, x: Tensor, target: Target = None, layer: int | str | None = None) -> Tensor:
    """Heatmaps `[B, h, w]`: how much each place in a layer raises the score of the target class.

    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization" (ICCV 2017),
    eq. 1 and 2: channels weighted by their gradient's mean over places, summed, negative values cut; not scaled.

    Args:
        x: images `[B, C, H, W]`.
        target: class index for all images, or one for each; the predicted class by default. Features are explained as
            `vitreous.score` tells.
        layer: number of an attention block, whose attention's input is taken, or the dotted name of any module, whose
            output is.

    Works on slimmed models, and in any mode of gradients. Raises `VitreousError` for unknown layers or targets, and when no
    gradient reaches the layer's places.
    """
    p = places(model, x, target, layer)
    return p.draw((p.slopes.mean(2, keepdim=True) * p.values).sum(1))


def grad_cam_pp(model: nn.Module, x: Tensor, target: Target = None, layer: int | str | None = None) -> Tensor:
    """Heatmaps `[B, h, w]`: Grad-CAM that lets each of several places of a class count, not only the largest.

    Chattopadhyay et al., "Grad-CAM++: Generalized Gradient-based Visual Explanations for Deep Convolutional Networks" (WACV
    2018), eq. 10 and 19, for the exponential of the score as there: with g the gradient and A the activation of a channel, each
    place counts α = g² / (2 g² + Σ A · g³) times its positive g. The exponential itself, one factor for a whole picture, is left
    out. A gradient of 0 counts nothing; no small number is added below, so that small gradients count as well as large ones.

    Arguments and errors as in `grad_cam`.
    """
    p = places(model, x, target, layer)
    alpha = (2 + p.values.sum(2, keepdim=True) * p.slopes).reciprocal()
    weights = (alpha.nan_to_num(0, 0, 0) * p.slopes.relu()).sum(2, keepdim=True)
    return p.draw((weights * p.values).sum(1))


def layer_cam(model: nn.Module, x: Tensor, target: Target = None, layer: int | str | None = None) -> Tensor:
    """Heatmaps `[B, h, w]`: Grad-CAM in which every place has weights of its own, so that earlier layers show detail.

    Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization" (TIP 2021), eq. 5 to 7: activations
    times their own positive gradients, summed over channels, negative values cut; not scaled. Arguments
    and errors as in `grad_cam`.
    """
    p = places(model, x, target, layer)
    return p.draw((p.slopes.relu() * p.values).sum(1))


def eigen_cam(model: nn.Module, x: Tensor, target: Target = None, layer: int | str | None = None) -> Tensor:
    """Heatmaps `[B, h, w]`: where a layer differs most from its own mean, whatever the class.

    Muhammad & Yeasin, "Eigen-CAM: Class Activation Map using Principal Components" (IJCNN 2020): the places' activations
    projected on their first principal component. As in pytorch-grad-cam they are centred first, which the paper does not say:
    else the component is little but their mean. Its sign is arbitrary, ours is that in which few places stand out from many
    (positive skew). Needs no gradients: `target` is taken, and changes nothing. Other
    arguments and errors as in `grad_cam`.
    """
    p = places(model, x, target, layer, gradients=False)
    centred = p.values - p.values.mean(2, keepdim=True)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    cam = sizes[:, :1] * directions[:, 0]
    return p.draw(cam * torch.where(cam.pow(3).sum(1, keepdim=True) < 0, -1, 1))
