"""Files of rows that are not JSON lines, turned once into JSON lines of the same rows, so that all that follows knows one kind of file.

What a row means is its format's business (data/formats/). A container yields each row with its place, or what is wrong with that row; it
raises DataError for a file of which the rest cannot be read. Bytes of pictures in a row become the name of a part of a tar.
"""
