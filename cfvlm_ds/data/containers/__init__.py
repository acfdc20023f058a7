"""Containers: files of rows other than JSON lines. They are converted once to JSON lines, the only kind that the rest of the package reads.

The format of a row (data/formats/) defines its meaning. A container yields the location of each row with the row or its error, and raises
DataError for a file that cannot be read to its end. A row that contains the bytes of a picture gets the name of a tar part instead.
"""
