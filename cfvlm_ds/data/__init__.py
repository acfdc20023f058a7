"""Data: manifests of counterfactual groups, their pictures, the data check, and the order in which a run uses the groups."""

from __future__ import annotations

from cfvlm_ds.data.check import check_manifest, check_rows, sound_groups
from cfvlm_ds.data.decoding import MAX_PIXELS, image_size, open_image
from cfvlm_ds.data.manifest import Root, data_roots, named_apart, open_groups, read_manifest
from cfvlm_ds.data.report import CheckReport
from cfvlm_ds.data.sampler import GroupSampler, PackedSampler
from cfvlm_ds.data.store import GroupStore
