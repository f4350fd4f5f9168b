"""The engine: token ids in, logits and token ids out. It knows no text."""

from airjax.engine.generation import Draw as Draw
from airjax.engine.generation import generate as generate
from airjax.engine.generation import score as score
from airjax.engine.model import Model as Model
from airjax.engine.model import open_model as open_model
from airjax.engine.stats import Stats as Stats
from airjax.engine.sweep import State as State
from airjax.engine.sweep import new_state as new_state
from airjax.engine.sweep import sweep as sweep
