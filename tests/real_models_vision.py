"""Networks from torchvision and timm: detection, segmentation, video, and small ones for images."""

from collections.abc import Callable
from typing import Any

import torch
from real_models import Batch, RealModel, images
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# ------------------------------------------------------------------------------------------------------------ detection


def pictures_with_boxes(samples: int) -> Batch:
    """Pictures of two sizes, each with two boxes."""
    boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
    return {
        "images": [torch.rand(3, 64, 64 + 16 * (i % 2)) for i in range(samples)],
        "targets": [{"boxes": boxes.clone(), "labels": torch.tensor([1, 2])} for _ in range(samples)],
    }


# Pixels, and regions of each picture that its second stage looks at.
SMALL = {
    "min_size": 64,
    "max_size": 96,
    "rpn_post_nms_top_n_train": 16,
    "rpn_post_nms_top_n_test": 16,
    "box_batch_size_per_image": 16,
}


def detector(name: str, **sizes: Any) -> nn.Module:
    from torchvision.models import detection

    return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3, **sizes)


def frozen_detector() -> nn.Module:
    """With the backbone that torchvision makes by default, of FrozenBatchNorm2d."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return FasterRCNN(backbone, num_classes=3, **SMALL)


def features(detector: nn.Module, batch: Batch) -> list[Tensor]:
    """What its backbone returns: the boxes are a selection, which a rounding may change."""
    pictures, _ = detector.transform(batch["images"])
    return tree_leaves(detector.backbone(pictures.tensors))


# ------------------------------------------------------------------------------------------ segmentation, video, images


def segmentation(name: str) -> nn.Module:
    from torchvision.models import segmentation as models

    return getattr(models, name)(weights=None, weights_backbone=None, num_classes=3)


def video(name: str) -> nn.Module:
    from torchvision.models import video as models

    model = getattr(models, name)(weights=None, num_classes=3)
    model.avgpool = nn.AdaptiveAvgPool3d(1)  # that of S3D is for 224 x 224 pixels
    return model


def clips(frames: int, size: int) -> Callable[[int], Batch]:
    return lambda samples: {"x": torch.randn(samples, 3, frames, size, size)}


def classifier(name: str, **sizes: Any) -> nn.Module:
    from torchvision import models

    return getattr(models, name)(weights=None, num_classes=3, **sizes)


def of_timm(name: str, **sizes: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=3, **sizes)


DETECTORS = {"torchvision-fasterrcnn", "torchvision-fasterrcnn-frozen", "torchvision-ssdlite"}
# Their only BatchNorm layers are torchvision's FrozenBatchNorm2d.
FROZEN = {"torchvision-fasterrcnn-frozen"}

SQUARES = images(64, name="x")

VISION: tuple[RealModel, ...] = (
    RealModel(
        "torchvision-fasterrcnn",
        "torchvision",
        lambda: detector("fasterrcnn_resnet50_fpn_v2", **SMALL, box_score_thresh=0.0),
        pictures_with_boxes,
    ),
    RealModel("torchvision-fasterrcnn-frozen", "torchvision", frozen_detector, pictures_with_boxes),
    RealModel(
        "torchvision-ssdlite", "torchvision", lambda: detector("ssdlite320_mobilenet_v3_large"), pictures_with_boxes
    ),
    RealModel("torchvision-deeplabv3", "torchvision", lambda: segmentation("deeplabv3_mobilenet_v3_large"), SQUARES),
    RealModel(
        "torchvision-lraspp", "torchvision", lambda: segmentation("lraspp_mobilenet_v3_large"), images(64, name="input")
    ),
    RealModel("torchvision-r3d", "torchvision", lambda: video("r3d_18"), clips(4, 32)),
    RealModel("torchvision-s3d", "torchvision", lambda: video("s3d"), clips(16, 64)),
    RealModel("torchvision-efficientnet", "torchvision", lambda: classifier("efficientnet_b0"), SQUARES),
    RealModel("torchvision-googlenet", "torchvision", lambda: classifier("googlenet", init_weights=False), SQUARES),
    RealModel("timm-efficientnet", "timm", lambda: of_timm("efficientnet_b0"), SQUARES),
    RealModel("timm-mobilenetv4", "timm", lambda: of_timm("mobilenetv4_conv_small"), SQUARES),
    RealModel("timm-fastvit", "timm", lambda: of_timm("fastvit_t8"), SQUARES),
    RealModel("timm-levit", "timm", lambda: of_timm("levit_128s", img_size=64), SQUARES),
    # Whose norm-act layers have activations and drops of many kinds.
    RealModel("timm-regnet", "timm", lambda: of_timm("regnety_002", drop_rate=0.1), SQUARES),
    RealModel("timm-resnetv2", "timm", lambda: of_timm("resnetv2_18d", drop_path_rate=0.1), SQUARES),
)
