"""The engine: token ids in, logits and token ids out. It knows no text."""

from airjax.engine.generation import Draw as Draw
from airjax.engine.generation import generate as generate
from airjax.engine.generation import score as score
from airjax.engine.lookup import embed as embed
from airjax.engine.model import Model as Model
from airjax.engine.model import open_model as open_model
from airjax.engine.request import Constraint as Constraint
from airjax.engine.request import Event as Event
from airjax.engine.request import Request as Request
from airjax.engine.scheduler import BatchStats as BatchStats
from airjax.engine.scheduler import Scheduler as Scheduler
from airjax.engine.stats import Stats as Stats
from airjax.engine.sweep import State as State
from airjax.engine.sweep import new_state as new_state
from airjax.engine.sweep import sweep as sweep
