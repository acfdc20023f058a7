"""Containers: files of rows that are not JSON lines. Each is converted once to JSON lines, the only kind of file that the rest of the
package reads.

The format of a row (data/formats/) defines its meaning. A container yields the location of each row with the row or its error, and raises
DataError for a file that cannot be read to its end. If a row contains the bytes of a picture, they are replaced with the name of a part of
a tar.
"""
