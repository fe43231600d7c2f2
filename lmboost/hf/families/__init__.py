"""The architectures of the transformers library that the decoder computes.

Each says how its config.json becomes a ModelConfig and back, and where its tensors lie in the parameters.
"""

from lmboost.hf.families.gemma import GEMMA2, GEMMA3
from lmboost.hf.families.layernorm import GPT2, NEOX, OPT
from lmboost.hf.families.llama import GRANITE, LLAMA, MISTRAL, OLMO2, OLMO3, PHI3, QWEN2, QWEN3, SMOLLM3

# In the order in which a model of ours is offered to them.
FAMILIES = (
    LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GPT2, OPT, NEOX, OLMO3, SMOLLM3, GRANITE, PHI3, GEMMA2, GEMMA3,
)  # fmt: skip
