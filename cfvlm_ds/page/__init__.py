"""Static pages: groups of pictures and texts to look at in a browser, from a folder, without a server.

Plain records in, a folder out. What the records say may come from files of somebody else's: it reaches the page as data and is never read
as HTML, as a script or as the name of a file.
"""

from __future__ import annotations

from cfvlm_ds.page.folder import Written, refuse_foreign_folder, write_page
from cfvlm_ds.page.groups import group_item
from cfvlm_ds.page.records import Image, Item, Page, ScoreTable, Text

__all__ = ["Image", "Item", "Page", "ScoreTable", "Text", "Written", "group_item", "refuse_foreign_folder", "write_page"]
