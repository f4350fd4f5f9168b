"""The `deepseek2` architecture: latent attention, experts in groups, shared ones (DeepSeek-V2 to V3.1, Kimi K2, GLM 4.7
Flash, Mistral Large 3); or neither groups nor experts (Youtu-LLM).

DeepSeek-AI, DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model, 2024.
"""

from __future__ import annotations

from airjax.models.latent import LatentDecoder, latent_config

ARCHITECTURE = LatentDecoder(latent_config)
