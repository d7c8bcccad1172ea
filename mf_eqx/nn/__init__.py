"""Building blocks for fields: layers, embeddings, attention and stacks of blocks, which `mf_eqx` can differentiate in
forward mode, and what optimisers need to know of them."""

from ._attention import (
    AbstractAttention as AbstractAttention,
    CudnnAttention as CudnnAttention,
    SelfAttention as SelfAttention,
    StoppedTangent as StoppedTangent,
    XLAAttention as XLAAttention,
)
from ._chunked_attention import ChunkedAttention as ChunkedAttention
from ._condition_embedding import (
    AbstractConditionEmbedding as AbstractConditionEmbedding,
    ConditionEmbedding as ConditionEmbedding,
    LabelEmbedding as LabelEmbedding,
    VectorEmbedding as VectorEmbedding,
)
from ._linear import Linear as Linear, SwiGLU as SwiGLU
from ._norm import (
    GroupNorm as GroupNorm,
    layer_norm as layer_norm,
    modulate as modulate,
    modulated_norm as modulated_norm,
    RMSNorm as RMSNorm,
)
from ._pallas_attention import PallasAttention as PallasAttention
from ._per_block import (
    muon_dimension_numbers as muon_dimension_numbers,
    per_block as per_block,
    weight_mask as weight_mask,
)
from ._positions import (
    sinusoidal_line_positions as sinusoidal_line_positions,
    sinusoidal_positions as sinusoidal_positions,
)
from ._precision import cast as cast
from ._resample import downsample as downsample, upsample as upsample
from ._rotary import (
    rotary_angles as rotary_angles,
    rotary_line_angles as rotary_line_angles,
    RotarySelfAttention as RotarySelfAttention,
    rotate as rotate,
)
from ._stack import (
    known_unroll as known_unroll,
    products_saveable as products_saveable,
    Remat as Remat,
    REMATS as REMATS,
    Stack as Stack,
)
from ._time_embedding import (
    duration as duration,
    end_duration as end_duration,
    end_start as end_start,
    end_start_duration as end_start_duration,
    sinusoidal_embedding as sinusoidal_embedding,
    TimePairEmbedding as TimePairEmbedding,
    TimeVariables as TimeVariables,
)
from ._tokens import (
    AbstractConditionTokens as AbstractConditionTokens,
    ConditionTokens as ConditionTokens,
    ScalarEmbedding as ScalarEmbedding,
)
