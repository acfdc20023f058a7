"""Containers: files of rows other than JSON lines, converted once to JSON lines, so that the rest of the package reads one kind of file.

The meaning of a row is defined by its format (data/formats/). A container yields each row with its place, or the error of that row; it
raises DataError for a file whose rest cannot be read. The bytes of a picture in a row are replaced by the name of a part of a tar.
"""
