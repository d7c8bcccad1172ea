"""Networks that are fields."""

from .description import describe as describe, make_network as make_network
from .dit import (
    DiT as DiT,
    DIT_B2 as DIT_B2,
    DIT_B4 as DIT_B4,
    DIT_L2 as DIT_L2,
    DIT_M2 as DIT_M2,
    DIT_S2 as DIT_S2,
    DIT_S4 as DIT_S4,
    DIT_XL2 as DIT_XL2,
    DiTSize as DiTSize,
)
from .guidance import GuidanceCondition as GuidanceCondition
from .in_context_dit import InContextDiT as InContextDiT
from .in_context_embedding import TokenCounts as TokenCounts
from .in_context_size import (
    IMF_B2 as IMF_B2,
    IMF_L2 as IMF_L2,
    IMF_M2 as IMF_M2,
    IMF_XL2 as IMF_XL2,
    InContextDiTSize as InContextDiTSize,
    PMF_B16 as PMF_B16,
    PMF_H16 as PMF_H16,
    PMF_L16 as PMF_L16,
)
from .labels import check_labels_fit as check_labels_fit, number_of_labels as number_of_labels
from .mlp import MLP as MLP
from .unet import UNet as UNet
from .unet_embedding import UNetCondition as UNetCondition
from .unet_size import UNET_CIFAR10 as UNET_CIFAR10, UNetSize as UNetSize
from .x_prediction import XPrediction as XPrediction
