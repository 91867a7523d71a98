"""Networks from MONAI (1-D and 3-D) and torch_geometric, and what timm's norm-act layers are."""

import torch
import torch.nn.functional as F
from models import BatchNormAct2d
from real_models import Batch, RealModel
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------- medical images and signals


def volumes(samples: int) -> Batch:
    return {"x": torch.randn(samples, 1, 16, 16, 16)}


def signals(samples: int) -> Batch:
    return {"x": torch.randn(samples, 2, 32)}


def residual_net() -> nn.Module:
    from monai.networks.nets import ResNet

    return ResNet(
        "basic", [1, 1, 1, 1], [4, 8, 8, 16], spatial_dims=3, n_input_channels=1, conv1_t_size=3, num_classes=2
    )


def dense_net(spatial_dims: int, channels: int) -> nn.Module:
    from monai.networks.nets import DenseNet

    return DenseNet(spatial_dims, channels, 2, init_features=8, growth_rate=4, block_config=(1, 2), bn_size=2)


def attention_u_net() -> nn.Module:
    from monai.networks.nets import AttentionUnet

    return AttentionUnet(3, 1, 2, (4, 8, 8), (2, 2))


def u_net(spatial_dims: int, channels: int) -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(spatial_dims, channels, 2, (4, 8, 8), (2, 2), norm="batch", num_res_units=1)


def basic_u_net() -> nn.Module:
    from monai.networks.nets import BasicUNet

    return BasicUNet(3, 1, 2, features=(4, 4, 8, 8, 8, 4), norm="batch")


# ------------------------------------------------------------------------------------------------------------- graphs


def graphs(samples: int) -> Batch:
    """So many rings of six nodes."""
    ring = torch.arange(6)
    edges = torch.stack([ring, (ring + 1) % 6])
    edges = torch.cat([edges, edges.flip(0)], dim=1)
    return {
        "x": torch.randn(6 * samples, 4),
        "edge_index": torch.cat([edges + 6 * graph for graph in range(samples)], dim=1),
    }


def typed_nodes(samples: int) -> Batch:
    return {**graphs(samples), "types": torch.arange(6 * samples) % 3}


def graph_convolutions() -> nn.Module:
    from torch_geometric.nn import GCN

    return GCN(4, 8, num_layers=3, out_channels=2, norm="batch_norm", norm_kwargs={"allow_single_element": True})


def graph_isomorphisms() -> nn.Module:
    from torch_geometric.nn import GIN

    return GIN(4, 8, num_layers=2, out_channels=2, norm="batch_norm")


class TypedNodes(nn.Module):
    """A norm for each type of node, which is no nn.BatchNorm, beside one for all of them."""

    def __init__(self) -> None:
        from torch_geometric.nn import BatchNorm, GCNConv, HeteroBatchNorm

        super().__init__()
        self.convolution = GCNConv(4, 8)
        self.norm = BatchNorm(8)
        self.norm_by_type = HeteroBatchNorm(8, num_types=3)

    def forward(self, x: Tensor, edge_index: Tensor, types: Tensor) -> Tensor:
        return self.norm_by_type(self.norm(self.convolution(x, edge_index)).relu(), types)


# --------------------------------------------------------------------------- timm, whose import asks for torchvision


class SyncBatchNormAct(nn.SyncBatchNorm):
    """What timm.layers.SyncBatchNormAct is: drop and act come from the layer it was made of."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if hasattr(self, "drop"):
            x = self.drop(x)
        if hasattr(self, "act"):
            x = self.act(x)
        return x


class FrozenBatchNormAct2d(nn.Module):
    """What timm.layers.FrozenBatchNormAct2d is: statistics and affine parameters are buffers."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        bias = b - rm * scale
        return self.act(self.drop(x * scale + bias))


def sync_norm_act(num_features: int) -> SyncBatchNormAct:
    """A layer as timm.layers.convert_sync_batchnorm makes it of a BatchNormAct2d."""
    plain = BatchNormAct2d(num_features, act_layer=nn.SiLU, drop_layer=nn.Dropout2d)
    layer = SyncBatchNormAct(num_features)
    layer.act = plain.act
    layer.drop = plain.drop
    return layer


class NormActs(nn.Module):
    """Convolutions with each of timm's norm-act layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1, bias=False) for c in (3, 4, 4))
        self.norms = nn.ModuleList([FrozenBatchNormAct2d(4), BatchNormAct2d(4), sync_norm_act(4)])

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms):
            x = norm(convolution(x))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


ELSEWHERE: tuple[RealModel, ...] = (
    RealModel("monai-resnet-3d", "monai", residual_net, volumes),
    RealModel("monai-densenet-3d", "monai", lambda: dense_net(3, 1), volumes),
    RealModel("monai-densenet-1d", "monai", lambda: dense_net(1, 2), signals),
    RealModel("monai-attention-unet-3d", "monai", attention_u_net, volumes),
    RealModel("monai-unet-3d", "monai", lambda: u_net(3, 1), volumes),
    RealModel("monai-unet-1d", "monai", lambda: u_net(1, 2), signals),
    RealModel("monai-basic-unet-3d", "monai", basic_u_net, volumes),
    RealModel("pyg-gcn", "torch_geometric", graph_convolutions, graphs),
    RealModel("pyg-gin", "torch_geometric", graph_isomorphisms, graphs),
    RealModel("pyg-hetero", "torch_geometric", TypedNodes, typed_nodes),
    RealModel("timm-norm-acts", "torch", NormActs, lambda samples: {"x": torch.randn(samples, 3, 6, 6)}),
)
