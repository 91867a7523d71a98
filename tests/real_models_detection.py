"""transformers' models with BatchNorm that find and read things in images: objects, layouts, text, key points."""

from typing import Any

import torch
from real_models import Batch, RealModel, images, transformers_model
from real_models_images import LC_NET, RESNET

BACKBONE = {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}
RT_BACKBONE = {**BACKBONE, "model_type": "rt_detr_resnet"}
LAST_STAGE = {**RESNET, "out_features": ["stage4"]}
HG_NET = {
    "model_type": "hgnet_v2",
    "embedding_size": 4,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 8, 16],
    "stem_channels": [3, 4, 8],
    "stage_in_channels": [8, 8, 8, 8],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 8, 8, 16],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "out_features": ["stage2", "stage3", "stage4"],
}
DETR: dict[str, Any] = {
    "backbone_config": LAST_STAGE,
    "num_queries": 3,
    "encoder_layers": 1,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_layers": 1,
    "decoder_ffn_dim": 16,
    "decoder_attention_heads": 2,
    "d_model": 16,
}
# Its projections normalise groups of 32 channels.
WIDE_DETR = {**DETR, "backbone_config": BACKBONE, "d_model": 32, "num_feature_levels": 3, "decoder_layers": 2}
RT_DETR: dict[str, Any] = {
    "backbone_config": RT_BACKBONE,
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [8, 8, 16],
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "d_model": 16,
    "num_queries": 3,
    "decoder_in_channels": [16, 16, 16],
    "decoder_ffn_dim": 16,
    "decoder_n_points": 2,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_denoising": 0,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
# Kernel, stride and padding of each convolution.
INTRACLASS = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{
        f"{name}_{ratio}ratio": [
            [k if tall else 1, k if wide else 1],
            1,
            [k // 2 if tall else 0, k // 2 if wide else 0],
        ]
        for ratio, k in {"long": 7, "mid": 5, "short": 3}.items()
        for name, (tall, wide) in {
            "vertical_long_to_small_conv": (True, False),
            "horizontal_small_to_long_conv": (False, True),
            "symmetric_conv_long": (True, True),
        }.items()
    },
}
LC_NET_V4 = {
    "model_type": "pp_lcnet_v4",
    "stem_channels": [3, 8, 8],
    "block_configs": LC_NET,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


def pictures_and_queries(samples: int) -> Batch:
    return {**images(64)(samples), "input_ids": torch.tensor([[2, 7, 4, 3]] * samples)}


def pictures_and_classes(samples: int) -> Batch:
    text = torch.tensor([[2, 7, 3]])
    return {
        **images(64)(samples),
        "classes_input_ids": text.repeat(2 * samples, 1),
        "classes_attention_mask": torch.ones(2 * samples, 3, dtype=torch.long),
        "tasks_input_ids": text.repeat(samples, 1),
        "tasks_attention_mask": torch.ones(samples, 3, dtype=torch.long),
        "classes_structure": torch.tensor([2] * samples),
    }


def gray_pairs(samples: int) -> Batch:
    return {"pixel_values": torch.randn(samples, 2, 1, 64, 64)}


# Whose only BatchNorm layers are frozen, as those of the backbone; for those that have no others.
FROZEN = {
    "detr",
    "conditional_detr",
    "table_transformer",
    "deformable_detr",
    "dab_detr",
    "grounding_dino",
    "mm_grounding_dino",
}

DETECTION: tuple[RealModel, ...] = (
    transformers_model("detr", "DetrForObjectDetection", images(64), **DETR),
    transformers_model("conditional_detr", "ConditionalDetrForObjectDetection", images(64), **DETR),
    transformers_model("table_transformer", "TableTransformerForObjectDetection", images(64), **DETR),
    transformers_model("deformable_detr", "DeformableDetrForObjectDetection", images(64), **WIDE_DETR),
    transformers_model(
        "dab_detr",
        "DabDetrForObjectDetection",
        images(64),
        **{("hidden_size" if name == "d_model" else name): value for name, value in DETR.items()},
    ),
    transformers_model("rt_detr", "RTDetrForObjectDetection", images(64), **RT_DETR),
    transformers_model(
        "rt_detr_v2", "RTDetrV2ForObjectDetection", images(64), **RT_DETR, freeze_backbone_batch_norms=False
    ),
    transformers_model(
        "d_fine", "DFineForObjectDetection", images(64), **{**RT_DETR, "backbone_config": HG_NET}, lqe_hidden_dim=8
    ),
    transformers_model(
        "deimv2", "Deimv2ForObjectDetection", images(64), **{**RT_DETR, "backbone_config": HG_NET}, lqe_hidden_dim=8
    ),
    transformers_model(
        "pp_doclayout_v2",
        "PPDocLayoutV2ForObjectDetection",
        images(64),
        **{**RT_DETR, "backbone_config": HG_NET},
        class_thresholds=[0.5, 0.5],
        class_order=[0, 1],
        reading_order_config={
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "rel_pos_bins": 4,
            "rel_2d_pos_bins": 4,
            "max_position_embeddings": 32,
            "coordinate_size": 3,
            "shape_size": 2,
            "global_pointer_head_size": 8,
        },
    ),
    transformers_model(
        "pp_doclayout_v3",
        "PPDocLayoutV3ForObjectDetection",
        images(64),
        **{**RT_DETR, "backbone_config": {**HG_NET, "out_features": ["stage1", "stage2", "stage3", "stage4"]}},
        mask_feature_channels=[8, 8],
        x4_feat_dim=8,
        num_prototypes=4,
        global_pointer_head_size=8,
    ),
    transformers_model(
        "pp_doclayout_v4",
        "PPDocLayoutV4ForObjectDetection",
        images(64),
        **{**RT_DETR, "backbone_config": HG_NET},
        global_pointer_head_size=8,
        hidden_size=16,
    ),
    transformers_model(
        "lw_detr",
        "LwDetrForObjectDetection",
        images(64),
        backbone_config={
            "model_type": "lw_detr_vit",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_ratio": 2,
            "image_size": 64,
            "pretrain_image_size": 64,
            "num_windows": 4,
            "window_block_indices": [0],
            "out_indices": [1, 2],
        },
        projector_scale_factors=[1.0],
        d_model=16,
        c2f_num_blocks=1,
        decoder_ffn_dim=16,
        decoder_n_points=2,
        decoder_layers=1,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        num_queries=3,
        group_detr=2,
    ),
    transformers_model(
        "grounding_dino",
        "GroundingDinoForObjectDetection",
        pictures_and_queries,
        **WIDE_DETR,
        text_config=BERT,
        encoder_n_points=2,
        decoder_n_points=2,
        max_text_len=8,
    ),
    transformers_model(
        "mm_grounding_dino",
        "MMGroundingDinoForObjectDetection",
        pictures_and_queries,
        **WIDE_DETR,
        text_config=BERT,
        encoder_n_points=2,
        decoder_n_points=2,
        max_text_len=8,
    ),
    transformers_model(
        "pp_ocrv5_mobile_det",
        "PPOCRV5MobileDetForObjectDetection",
        images(64),
        backbone_config={
            "model_type": "pp_lcnet_v3",
            "stem_channels": 8,
            "block_configs": [*LC_NET, [[5, 16, 16, 2, True]]],
            "out_features": ["stage2", "stage3", "stage4", "stage5"],
            "conv_symmetric_num": 2,
        },
        neck_out_channels=16,
        layer_list_out_channels=[8, 8, 8, 8],
    ),
    transformers_model(
        "pp_ocrv6_small_det",
        "PPOCRV6SmallDetForObjectDetection",
        images(64),
        backbone_config=LC_NET_V4,
        neck_out_channels=16,
        layer_list_out_channels=[8, 16, 16, 16],
    ),
    transformers_model(
        "pp_ocrv5_server_det",
        "PPOCRV5ServerDetForObjectDetection",
        images(64),
        backbone_config={**HG_NET, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        neck_out_channels=16,
        intraclass_block_number=4,
        intraclass_block_config=INTRACLASS,
        kernel_list=[3, 2, 2],
        scale_factor_list=[1, 2, 4, 8],
        scale_factor=2,
    ),
    transformers_model(
        "pp_ocrv6_medium_det",
        "PPOCRV6MediumDetForObjectDetection",
        images(64),
        backbone_config=LC_NET_V4,
        neck_out_channels=16,
        intraclass_block_number=4,
        intraclass_block_config=INTRACLASS,
        kernel_list=[3, 2, 2],
        scale_factor_list=[1, 2, 4, 8],
        scale_factor=2,
    ),
    transformers_model(
        "pp_ocrv5_server_rec",
        "PPOCRV5ServerRecForTextRecognition",
        images(96),
        backbone_config={**HG_NET, "out_features": ["stage4"]},
        hidden_size=16,
        depth=1,
        head_out_channels=12,
        num_attention_heads=2,
    ),
    transformers_model(
        "pp_ocrv5_mobile_rec",
        "PPOCRV5MobileRecForTextRecognition",
        images(96),
        backbone_config={
            "model_type": "pp_lcnet_v3",
            "stem_channels": 8,
            "block_configs": [*LC_NET, [[5, 16, 16, 2, True]]],
            "out_features": ["stage5"],
            "conv_symmetric_num": 2,
        },
        hidden_size=16,
        depth=1,
        head_out_channels=12,
        num_attention_heads=2,
    ),
    transformers_model(
        "pp_ocrv6_small_rec",
        "PPOCRV6SmallRecForTextRecognition",
        images(96),
        backbone_config={**LC_NET_V4, "out_features": ["stage4"]},
        hidden_size=16,
        depth=1,
        head_out_channels=12,
        num_attention_heads=2,
    ),
    transformers_model(
        "pp_ocrv6_tiny_rec",
        "PPOCRV6TinyRecForTextRecognition",
        images(96),
        backbone_config={**LC_NET_V4, "out_features": ["stage4"]},
        hidden_size=16,
        head_out_channels=12,
    ),
    transformers_model(
        "slanet",
        "SLANetForTableRecognition",
        images(64),
        backbone_config={
            "model_type": "pp_lcnet",
            "stem_channels": 8,
            "block_configs": [*LC_NET, [[5, 16, 16, 2, True]]],
            "out_features": ["stage2", "stage3", "stage4", "stage5"],
        },
        post_conv_out_channels=8,
        out_channels=6,
        hidden_size=16,
        max_text_length=4,
    ),
    transformers_model(
        "efficientloftr",
        "EfficientLoFTRModel",
        gray_pairs,
        stage_num_blocks=[1, 2, 1, 1],
        out_features=[4, 8, 8, 16],
        hidden_size=16,
        num_attention_heads=8,
        num_attention_layers=1,
    ),
    transformers_model(
        "superglue",
        "SuperGlueForKeypointMatching",
        gray_pairs,
        keypoint_detector_config={
            "model_type": "superpoint",
            "encoder_hidden_sizes": [4, 4, 8, 8],
            "decoder_hidden_size": 8,
            "descriptor_decoder_dim": 16,
            "keypoint_threshold": 0.0,
            "max_keypoints": 8,
        },
        hidden_size=16,
        keypoint_encoder_sizes=[8],
        gnn_layers_types=["self", "cross"],
        num_attention_heads=2,
        sinkhorn_iterations=2,
    ),
    transformers_model(
        "omdet_turbo",
        "OmDetTurboForObjectDetection",
        pictures_and_classes,
        backbone_config=BACKBONE,
        apply_layernorm_after_vision_backbone=False,
        image_size=64,
        text_config={
            "model_type": "clip_text_model",
            "vocab_size": 20,
            "hidden_size": 24,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 8,
            "projection_dim": 16,
            "eos_token_id": 3,
        },
        text_projection_in_dim=24,
        text_projection_out_dim=24,
        task_encoder_hidden_dim=16,
        class_embed_dim=24,
        num_queries=3,
        encoder_hidden_dim=16,
        vision_features_channels=[16, 16, 16],
        encoder_in_channels=[8, 8, 16],
        encoder_attention_heads=2,
        encoder_dim_feedforward=16,
        decoder_hidden_dim=16,
        decoder_num_heads=2,
        decoder_num_layers=1,
        decoder_dim_feedforward=16,
        decoder_num_points=2,
    ),
)
