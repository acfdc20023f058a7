"""ARO (Yuksekgonul et al. 2023, arXiv 2210.01936), VG-Relation and VG-Attribution: a true caption, and a copy with two words or phrases
swapped.

As in the authors' loader, pictures are cropped to the annotated boxes. Crops are saved as PNG files in the folder ``cut`` and reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data.decoding import open_image
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, Item, Judged, Values, single
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, macro, macro_by, tag
from cfvlm_ds.evaluation.benchmarks.source import File, Row, keep_picture

BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
CUTS = "cut"
LEAST = 25
"""Minimum number of items that an attribute pair needs to count towards the mean, as in the authors' code."""
_SYMMETRIC = (
    "adjusting|attached to|between|bigger than|biting|boarding|brushing|chewing|cleaning|climbing|close to|coming from|"
    "coming out of|contain|crossing|dragging|draped over|drinking|drinking from|driving|driving down|driving on|"
    "eating from|eating in|enclosing|exiting|facing|filled with|floating in|floating on|flying|flying above|flying in|"
    "flying over|flying through|full of|going down|going into|going through|grazing in|growing in|growing on|guiding|"
    "hanging from|hanging in|hanging off|hanging over|higher than|holding onto|hugging|in between|jumping off|jumping on|"
    "jumping over|kept in|larger than|leading|leaning over|leaving|licking|longer than|looking in|looking into|"
    "looking out|looking over|looking through|lying next to|lying on top of|making|mixed with|mounted on|moving|"
    "on the back of|on the edge of|on the front of|on the other side of|opening|painted on|parked at|parked beside|"
    "parked by|parked in|parked in front of|parked near|parked next to|perched on|petting|piled on|playing|playing in|"
    "playing on|playing with|pouring|reaching for|reading|reflected on|riding on|running in|running on|running through|"
    "seen through|sitting behind|sitting beside|sitting by|sitting in front of|sitting near|sitting next to|sitting under|"
    "skiing down|skiing on|sleeping in|sleeping on|smiling at|sniffing|splashing|sprinkled on|stacked on|standing against|"
    "standing around|standing behind|standing beside|standing in front of|standing near|standing next to|staring at|"
    "stuck in|surrounding|swimming in|swinging|talking to|topped with|touching|traveling down|traveling on|tying|"
    "typing on|underneath|wading in|waiting for|walking across|walking by|walking down|walking next to|walking through|"
    "working in|working on|worn on|wrapped around|wrapped in|by|of|near|next to|with|beside|on the side of|around"
)
SYMMETRIC = frozenset(_SYMMETRIC.split("|"))
"""Relations that the authors' notebook excludes from the mean."""


RELATION = File("visual_genome_relation.json", rows=23_937)
ATTRIBUTION = File("visual_genome_attribution.json", rows=28_748)


def relation_item(row: Row) -> Item:
    return _pair(row, relation=row.text("relation_name"))


def attribution_item(row: Row) -> Item:
    first, second = row["attributes"][:2]
    return _pair(row, attributes=f"{first}_{second}")


def _pair(row: Row, **tags: str) -> Item:
    picture = row.picture(row["image_path"], "images")
    box = tuple(row[key] for key in BOX)
    if not all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1 << 20 for value in box) or not min(box[2:]):
        raise row.error(f"the box {box} must be four whole numbers, with a positive width and height")
    captions = row.text("true_caption"), row.text("false_caption")
    cut = picture if picture in row.source.absent else _cut(picture, box, row.source.root)
    return single(row.number, cut, captions, str(row["image_path"]), **tags)


def _cut(picture: Path, box: Sequence[int], root: Path) -> Path:
    """Crop a picture to a box, unless the crop is already on disk, and return the path of the crop. Raises DataError if the box extends
    beyond the picture.
    """
    x, y, width, height = box
    cut = root / CUTS / f"{picture.stem}_{x}_{y}_{width}_{height}.png"
    if cut.is_file():
        return cut
    image = open_image(picture)
    if x + width > image.width or y + height > image.height:
        raise DataError(f"{picture}: has {image.width} x {image.height} pixels, so the box {tuple(box)} does not fit in it")
    return keep_picture(root, cut, image.crop((x, y, x + width, y + height)))


def relation_metrics(table: Sequence[Judged]) -> Values:
    """Return the mean accuracy over asymmetric relations, and the accuracy over all items."""
    asymmetric = [judged for judged in table if judged.item.tags["relation"] not in SYMMETRIC]
    return macro(asymmetric, tag("relation")) | accuracy(table)


VG_RELATION = Benchmark(
    title="ARO, VG-Relation",
    files=(RELATION,),
    item=relation_item,
    metrics=relation_metrics,
    headline="macro",
    probes=("match", "caption", "letters"),
)
VG_ATTRIBUTION = Benchmark(
    title="ARO, VG-Attribution",
    files=(ATTRIBUTION,),
    item=attribution_item,
    metrics=macro_by("attributes", LEAST),
    headline="macro",
    probes=("match", "caption", "letters"),
)
