"""Public benchmarks, read from their official files. A benchmark's module converts rows to items and defines metrics.

Licences, known pitfalls and published values are in docs/benchmarks. Nothing is downloaded. To add a benchmark of your own, register it:
``BENCHMARKS["mine"] = Benchmark(...)``.
"""

from __future__ import annotations

from cfvlm_ds.evaluation.benchmarks.amber import AMBER, AMBER_GENERATIVE
from cfvlm_ds.evaluation.benchmarks.aro import VG_ATTRIBUTION, VG_RELATION
from cfvlm_ds.evaluation.benchmarks.aro_order import COCO_ORDER, FLICKR_ORDER
from cfvlm_ds.evaluation.benchmarks.base import (
    Benchmark,
    Item,
    Judged,
    Loaded,
    Outcome,
    load,
    random_scores,
    results,
)
from cfvlm_ds.evaluation.benchmarks.bivlc import BIVLC
from cfvlm_ds.evaluation.benchmarks.blink import BLINK
from cfvlm_ds.evaluation.benchmarks.chair import CHAIR
from cfvlm_ds.evaluation.benchmarks.cola import COLA
from cfvlm_ds.evaluation.benchmarks.conme import CONME
from cfvlm_ds.evaluation.benchmarks.cvbench import CVBENCH
from cfvlm_ds.evaluation.benchmarks.eqben import EQBEN
from cfvlm_ds.evaluation.benchmarks.hallusionbench import HALLUSIONBENCH
from cfvlm_ds.evaluation.benchmarks.mme import MME
from cfvlm_ds.evaluation.benchmarks.mmstar import MMSTAR
from cfvlm_ds.evaluation.benchmarks.mmvp import MMVP
from cfvlm_ds.evaluation.benchmarks.naturalbench import NATURALBENCH
from cfvlm_ds.evaluation.benchmarks.pope import POPE
from cfvlm_ds.evaluation.benchmarks.source import File, Row, Source
from cfvlm_ds.evaluation.benchmarks.sugarcrepe import SUGARCREPE
from cfvlm_ds.evaluation.benchmarks.sugarcrepe_pp import SUGARCREPE_PP
from cfvlm_ds.evaluation.benchmarks.valse import VALSE
from cfvlm_ds.evaluation.benchmarks.vismin import VISMIN
from cfvlm_ds.evaluation.benchmarks.visual_counterfact import VISUAL_COUNTERFACT
from cfvlm_ds.evaluation.benchmarks.vl_checklist import VL_CHECKLIST
from cfvlm_ds.evaluation.benchmarks.vsr import VSR
from cfvlm_ds.evaluation.benchmarks.whatsup import WHATSUP
from cfvlm_ds.evaluation.benchmarks.winoground import WINOGROUND

BENCHMARKS: dict[str, Benchmark] = {
    "sugarcrepe": SUGARCREPE,
    "winoground": WINOGROUND,
    "pope": POPE,
    "naturalbench": NATURALBENCH,
    "mmvp": MMVP,
    "aro_relation": VG_RELATION,
    "aro_attribution": VG_ATTRIBUTION,
    "aro_coco_order": COCO_ORDER,
    "aro_flickr_order": FLICKR_ORDER,
    "valse": VALSE,
    "hallusionbench": HALLUSIONBENCH,
    "whatsup": WHATSUP,
    "eqben": EQBEN,
    "sugarcrepe_pp": SUGARCREPE_PP,
    "bivlc": BIVLC,
    "vismin": VISMIN,
    "cola": COLA,
    "conme": CONME,
    "vl_checklist": VL_CHECKLIST,
    "mme": MME,
    "amber": AMBER,
    "amber_generative": AMBER_GENERATIVE,
    "chair": CHAIR,
    "vsr": VSR,
    "cvbench": CVBENCH,
    "mmstar": MMSTAR,
    "blink": BLINK,
    "visual_counterfact": VISUAL_COUNTERFACT,
}
