"""Containers: data files other than JSON lines. Each is converted once to JSON lines, the only file type that the rest of the package
reads.

A container's parser yields the location of each row together with the row or, if the row is invalid, its error. It raises DataError for a
file that cannot be read completely. Picture bytes in a row are replaced with a reference to their position in a file. The format
(data/formats/), not the container, defines the meaning of a row.
"""
