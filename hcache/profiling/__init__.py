"""Head profiles: how fast each KV head's attention moves, and which heads look at the same tokens.

    overlap.py     overlap statistics of top-k sets, streamed over decode steps
    capture.py     profile_heads: runs a model over calibration texts and feeds the statistics
    clustering.py  from scores to roles: star clustering, anchors and volatile heads, allocation weights
    profile.py     HeadProfile: the scores of one model, saved, loaded, tied to its weights
    published.py   import of the JSON files published with HeteroCache (arXiv 2601.13684)
    library.py     reading profiles, and finding the one of a model by its fingerprint

Profiles are facts about a model. This package knows no compression method.
"""

from hcache.profiling.capture import profile_heads
from hcache.profiling.clustering import Role, Roles, allocation_weights, assign_roles, star_clusters
from hcache.profiling.library import ProfileNotFound, find_profile, load_profile
from hcache.profiling.overlap import Graph
from hcache.profiling.profile import ForeignProfile, HeadProfile
from hcache.profiling.published import PublishedProfile

__all__ = [
    "ForeignProfile",
    "Graph",
    "HeadProfile",
    "ProfileNotFound",
    "PublishedProfile",
    "Role",
    "Roles",
    "allocation_weights",
    "assign_roles",
    "find_profile",
    "load_profile",
    "profile_heads",
    "star_clusters",
]
