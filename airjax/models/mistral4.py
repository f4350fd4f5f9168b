"""The `mistral4` architecture: latent attention, whose queries may grow with position, and experts.

Mistral AI, Mistral Small 4, 2026.
"""

from __future__ import annotations

from airjax.models.latent import LatentDecoder, latent_config

ARCHITECTURE = LatentDecoder(latent_config)
