"""The one chain that a server or launcher needs: every usual setting, neutral unless given."""

from collections.abc import Mapping, Sequence

import jax

from airjax.sampling.bias import logit_bias as bias
from airjax.sampling.dry import dry
from airjax.sampling.mirostat import mirostat as mirostat_transform
from airjax.sampling.parameter import Parameter
from airjax.sampling.penalties import output_penalties, penalties
from airjax.sampling.temperature import dynamic_temperature
from airjax.sampling.transform import Transform, chain
from airjax.sampling.truncation import min_p as min_p_transform
from airjax.sampling.truncation import top_p as top_p_transform
from airjax.sampling.typical import top_n_sigma as top_n_sigma_transform
from airjax.sampling.typical import typical_p as typical_p_transform
from airjax.sampling.within import within_top_k
from airjax.sampling.xtc import xtc


def standard(
    *,
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] | None = None,
    repeat_penalty: Parameter = 1,
    repeat_last_n: Parameter = 64,
    frequency_penalty: Parameter = 0,
    presence_penalty: Parameter = 0,
    openai_frequency_penalty: Parameter = 0,
    openai_presence_penalty: Parameter = 0,
    dry_multiplier: Parameter = 0,
    dry_base: Parameter = 1.75,
    dry_allowed_length: Parameter = 2,
    dry_penalty_last_n: Parameter = -1,
    dry_sequence_breakers: Sequence[int] = (),
    top_n_sigma: Parameter = -1,
    top_k: Parameter = 0,
    typical_p: Parameter = 1,
    top_p: Parameter = 1,
    min_p: Parameter = 0,
    xtc_probability: Parameter = 0,
    xtc_threshold: Parameter = 0.1,
    temperature: Parameter = 1,
    dynatemp_range: Parameter = 0,
    dynatemp_exponent: Parameter = 1,
    mirostat: Parameter = 0,
    mirostat_tau: Parameter = 5.0,
    mirostat_eta: Parameter = 0.1,
    key: jax.Array | None = None,
) -> Transform:
    """A fixed chain in llama.cpp's default order, under its names; what is not given changes nothing, bit for bit.

    The order: logit bias, penalties, DRY, top-n-sigma, top-k, typical-p, top-p, min-p, XTC, temperature, mirostat.
    All chains have the same structure, so a scheduler made with `standard()` takes any of them.

    Args:
      logit_bias: see `logit_bias`; token ids.
      repeat_penalty: see `penalties`, with the three that follow, which count the prompt too.
      repeat_last_n: the window of these in tokens; 0 off, -1 the whole history of 4096.
      frequency_penalty: times how often a token occurs in the window.
      presence_penalty: once for a token in the window.
      openai_frequency_penalty: see `output_penalties`; counts generated tokens only, as OpenAI's interface does.
      openai_presence_penalty: likewise.
      dry_multiplier: see `dry`, with the four that follow.
      dry_base: growth per repeated token.
      dry_allowed_length: repeats up to below this length are free.
      dry_penalty_last_n: window in tokens; 0 off, -1 the whole history of 4096.
      dry_sequence_breakers: token ids.
      top_n_sigma: see `top_n_sigma`; 0 and below off.
      top_k: see `top_k`; 0 off.
      typical_p: see `typical_p`; 1 off.
      top_p: see `top_p`; 1 off.
      min_p: see `min_p`; 0 off.
      xtc_probability: see `xtc`; 0 off, otherwise it needs `key`.
      xtc_threshold: likewise.
      temperature: see `dynamic_temperature`; 0 is greedy, 1 off.
      dynatemp_range: to either side of the temperature; 0 off.
      dynatemp_exponent: how the temperature follows the entropy.
      mirostat: 0 off, 1 or 2; see `mirostat`. llama.cpp drops the other truncations then; here they apply if given.
      mirostat_tau: target surprise in bits.
      mirostat_eta: learning rate.
      key: a typed key for XTC and mirostat, consumed; not the one that draws.

    Returns:
      The chain.

    Raises:
      ValueError: if a setting is out of range, with its name, range and value.
    """
    xtc_key, mirostat_key = (None, None) if key is None else _split(key)
    return chain(
        chain(
            bias({} if logit_bias is None else logit_bias),
            penalties(repeat_penalty, frequency_penalty, presence_penalty, repeat_last_n),
            output_penalties(openai_frequency_penalty, openai_presence_penalty),
            dry(dry_multiplier, dry_base, dry_allowed_length, dry_penalty_last_n, dry_sequence_breakers),
            top_n_sigma_transform(top_n_sigma),
        ),
        within_top_k(
            top_k,
            chain(
                typical_p_transform(typical_p),
                top_p_transform(top_p),
                min_p_transform(min_p),
                xtc(xtc_probability, xtc_threshold, key=xtc_key),
                dynamic_temperature(temperature, dynatemp_range, dynatemp_exponent),
            ),
        ),
        mirostat_transform(mirostat, mirostat_tau, mirostat_eta, key=mirostat_key),
    )


def _split(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two keys of each key, of the same shape as `key`."""
    if key.ndim == 0:
        first, second = jax.random.split(key)
        return first, second
    pairs = jax.vmap(jax.random.split)(key)
    return pairs[:, 0], pairs[:, 1]
