"""Speculative decoding: drafts of the next tokens, checked together in one sweep."""

from airjax.engine.drafting.drafter import Draft as Draft
from airjax.engine.drafting.drafter import Drafter as Drafter
from airjax.engine.drafting.drafter import Sequel as Sequel
from airjax.engine.drafting.drafts import MOST_DRAFTED as MOST_DRAFTED
from airjax.engine.drafting.drafts import Drafts as Drafts
from airjax.engine.drafting.generation import generate_drafted as generate_drafted
from airjax.engine.drafting.law import Law as Law
from airjax.engine.drafting.ngrams import Lookup as Lookup
from airjax.engine.drafting.opening import budget_beside as budget_beside
from airjax.engine.drafting.opening import open_draft_model as open_draft_model
from airjax.engine.drafting.opening import taken as taken
from airjax.engine.drafting.opening import translation as translation
from airjax.engine.drafting.smaller import ResidentLayers as ResidentLayers
from airjax.engine.drafting.smaller import SmallerModel as SmallerModel
