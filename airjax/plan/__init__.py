"""The plan: what lives where under the memory budgets, decided before anything is allocated.

values   the plan itself, and the table that shows it
asked    what it is asked for, checked
limits   the numbers that it is made with
sizes, cache    bytes of weights, workspace and KV cache
decide   layers: resident or streamed, whole or in pieces
experts  the pool of a mixture's experts
tiers    how weights reach the device
"""

from airjax.plan.cache import kv_positions as kv_positions
from airjax.plan.decide import make_plan as make_plan
from airjax.plan.decide import manifests_of as manifests_of
from airjax.plan.decide import plan_first as plan_first
from airjax.plan.decide import plan_layers as plan_layers
from airjax.plan.limits import EMBEDDING as EMBEDDING
from airjax.plan.limits import EXPERT_TENSORS as EXPERT_TENSORS
from airjax.plan.limits import KV_PAGE as KV_PAGE
from airjax.plan.limits import LOGIT_ROWS_BYTES as LOGIT_ROWS_BYTES
from airjax.plan.limits import PREFILL_CHUNK as PREFILL_CHUNK
from airjax.plan.limits import TABLES as TABLES
from airjax.plan.tiers import choose_tier as choose_tier
from airjax.plan.values import GIB as GIB
from airjax.plan.values import Plan as Plan
from airjax.plan.values import PlanError as PlanError
from airjax.plan.values import Resident as Resident
from airjax.plan.values import Switch as Switch
from airjax.plan.values import Tier as Tier
from airjax.plan.values import format_plan as format_plan
from airjax.plan.values import to_dict as to_dict
