"""Speculative decoding: drafts of the next tokens, checked together in one sweep."""

from airjax.engine.drafting.drafter import Draft as Draft
from airjax.engine.drafting.drafter import Drafter as Drafter
from airjax.engine.drafting.drafter import Sequel as Sequel
from airjax.engine.drafting.drafts import MOST_DRAFTED as MOST_DRAFTED
from airjax.engine.drafting.drafts import Drafts as Drafts
from airjax.engine.drafting.drafts import make_drafts as make_drafts
from airjax.engine.drafting.generation import generate_drafted as generate_drafted
from airjax.engine.drafting.ngrams import Lookup as Lookup
