"""transformers' models of speech, time series, text and video with BatchNorm."""

from collections.abc import Callable

import torch
from real_models import Batch, RealModel, images, transformers_model
from torch import nn

CONFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8, 8],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
GRANITE = {
    "input_dim": 8,
    "num_layers": 2,
    "hidden_dim": 16,
    "num_heads": 2,
    "dim_head": 8,
    "output_dim": 4,
    "context_size": 8,
    "max_pos_emb": 16,
    "conv_kernel_size": 3,
    "feedforward_mult": 2,
}
FAST_CONFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_mel_bins": 16,
    "subsampling_conv_channels": 4,
}


def frames(name: str, length: int, features: int) -> Callable[[int], Batch]:
    """Sequences (N, L, features), as the keyword `name`."""
    return lambda samples: {name: torch.randn(samples, length, features)}


def waveforms(samples: int) -> Batch:
    return {"input_values": torch.randn(samples, 400)}


def speech_and_text(samples: int) -> Batch:
    return {
        "input_ids": torch.randint(3, 20, (samples, 7)),
        "decoder_input_values": torch.randn(samples, 8, 8),
        "speaker_embeddings": torch.randn(samples, 4),
    }


def phonemes(samples: int) -> Batch:
    lengths = torch.ones(samples, 8, dtype=torch.long)
    return {
        "input_ids": torch.randint(1, 20, (samples, 8)),
        "attention_mask": torch.ones(samples, 8, dtype=torch.long),
        "spectrogram_labels": torch.randn(samples, 8, 8),
        "duration_labels": lengths,
        "pitch_labels": torch.randn(samples, 8, 1),
        "energy_labels": torch.randn(samples, 8, 1),
    }


def past_and_future(samples: int) -> Batch:
    past, future = 8 + 2, 4
    return {
        "past_values": torch.randn(samples, past),
        "past_time_features": torch.randn(samples, past, 1),
        "past_observed_mask": torch.ones(samples, past),
        "future_values": torch.randn(samples, future),
        "future_time_features": torch.randn(samples, future, 1),
    }


def fused_audio(samples: int) -> Batch:
    return {"input_features": torch.randn(samples, 4, 32, 8), "is_longer": torch.tensor([[True]] * samples)}


def tokens(samples: int) -> Batch:
    return {"input_ids": torch.randint(0, 20, (samples, 8))}


def pictures_and_captions(samples: int) -> Batch:
    return {**images()(samples), "input_ids": torch.randint(0, 20, (samples, 8))}


def video(samples: int) -> Batch:
    return {"pixel_values": torch.randn(samples, 4, 3, 8, 8)}


def video_encoder() -> nn.Module:
    """The part of Emu3's video tokenizer with BatchNorm3d; the whole of it has no forward."""
    from transformers import Emu3VQVAEConfig
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAEEncoder

    sizes = {"channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32}
    return Emu3VQVAEEncoder(Emu3VQVAEConfig(base_channels=32, temporal_downsample_factor=2, **sizes))


SEQUENCES: tuple[RealModel, ...] = (
    transformers_model(
        "wav2vec2_conformer", "Wav2Vec2ConformerModel", waveforms, **CONFORMER, conv_depthwise_kernel_size=3
    ),
    transformers_model("hubert", "HubertModel", waveforms, **CONFORMER, conv_pos_batch_norm=True),
    transformers_model(
        "seamless_m4t",
        "SeamlessM4TSpeechEncoder",
        frames("input_features", 16, 8),
        hidden_size=16,
        speech_encoder_layers=1,
        speech_encoder_attention_heads=2,
        speech_encoder_intermediate_size=16,
        feature_projection_input_dim=8,
        conv_depthwise_kernel_size=3,
        adaptor_kernel_size=2,
        adaptor_stride=2,
    ),
    transformers_model(
        "speecht5",
        "SpeechT5ForTextToSpeech",
        speech_and_text,
        vocab_size=20,
        hidden_size=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        num_mel_bins=8,
        speech_decoder_prenet_units=8,
        speaker_embedding_dim=4,
        speech_decoder_postnet_layers=3,
        speech_decoder_postnet_units=8,
        reduction_factor=2,
    ),
    transformers_model(
        "fastspeech2_conformer",
        "FastSpeech2ConformerModel",
        phonemes,
        vocab_size=20,
        hidden_size=16,
        num_mel_bins=8,
        encoder_layers=1,
        encoder_linear_units=16,
        decoder_layers=1,
        decoder_linear_units=16,
        speech_decoder_postnet_layers=3,
        speech_decoder_postnet_units=8,
        encoder_kernel_size=3,
        decoder_kernel_size=3,
        duration_predictor_channels=8,
        energy_predictor_channels=8,
        pitch_predictor_channels=8,
        pitch_predictor_layers=2,
    ),
    transformers_model("granite_speech", "GraniteSpeechCTCEncoder", frames("hidden_states", 16, 8), **GRANITE),
    transformers_model("granite_speech_plus", "GraniteSpeechPlusCTCEncoder", frames("hidden_states", 16, 8), **GRANITE),
    transformers_model(
        "granite_speech5",
        "GraniteSpeech5Encoder",
        frames("input_features", 32, 64),
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_mel_bins=16,
        context_size=8,
        conv_kernel_size=3,
    ),
    transformers_model("parakeet", "ParakeetEncoder", frames("input_features", 64, 16), **FAST_CONFORMER),
    transformers_model("lasr", "LasrEncoder", frames("input_features", 64, 16), **FAST_CONFORMER, conv_kernel_size=3),
    transformers_model(
        "clap",
        "ClapAudioModel",
        fused_audio,
        enable_fusion=True,
        fusion_type="aff_2d",
        spec_size=32,
        num_mel_bins=8,
        patch_size=4,
        patch_stride=[4, 4],
        depths=[1, 1],
        num_attention_heads=[2, 2],
        patch_embeds_hidden_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        window_size=2,
        aff_block_r=2,
    ),
    transformers_model(
        "patchtst",
        "PatchTSTForPretraining",
        frames("past_values", 32, 2),
        num_input_channels=2,
        context_length=32,
        patch_length=4,
        patch_stride=4,
        num_hidden_layers=2,
        d_model=16,
        num_attention_heads=2,
        ffn_dim=16,
        channel_attention=True,
        do_mask_input=True,
    ),
    transformers_model(
        "patchtsmixer",
        "PatchTSMixerForPrediction",
        frames("past_values", 32, 2),
        num_input_channels=2,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        num_layers=2,
        norm_mlp="BatchNorm",
        prediction_length=4,
        loss="mse",
    ),
    transformers_model(
        "informer",
        "InformerForPrediction",
        past_and_future,
        prediction_length=4,
        context_length=8,
        lags_sequence=[1, 2],
        num_time_features=1,
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_layers=2,
        decoder_layers=1,
    ),
    transformers_model(
        "sam3_lite_text",
        "Sam3LiteTextTextModel",
        tokens,
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=8,
    ),
    transformers_model(
        "groupvit",
        "GroupViTModel",
        pictures_and_captions,
        text_config={
            "vocab_size": 20,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 8,
            "eos_token_id": 19,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "depths": [1, 1],
            "num_group_tokens": [4, 0],
            "num_output_groups": [4, 2],
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "assign_mlp_ratio": [0.5, 2],
        },
        projection_dim=8,
        projection_intermediate_dim=16,
    ),
    RealModel("emu3", "transformers", video_encoder, video),
    transformers_model(
        "perceiver",
        "PerceiverForImageClassificationConvProcessing",
        images(name="inputs"),
        num_latents=4,
        d_latents=16,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=1,
        num_labels=2,
        image_size=32,
    ),
)
